"""`tilewright provenance`: how an artifact or a checkpoint was made, from the dense model on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.tree import Tree

from tilewright.commands.output import Json, fail, print_json, stdout
from tilewright.errors import InvalidInput


def provenance(
    model: Annotated[Path, typer.Argument(help="Artifact, or checkpoint with provenance.json.")],
    verify: Annotated[Path | None, typer.Option(metavar="DIR", help="Verify the hashes against the files of a run.")] = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print the recipe, for compress to make the model anew.")] = False,
    as_json: Json = False,
) -> None:
    """Print the chain of steps that made a model."""
    from tilewright.pipeline import chain

    found = chain.read_chain(model)
    if recipe:
        if "recipe" not in found:
            raise InvalidInput(f"{model} was made step by step, not by a recipe; leave out --recipe to see the steps")
        import yaml

        print(yaml.safe_dump(found["recipe"], sort_keys=False), end="")
        return
    checks = chain.verify(model, verify) if verify is not None else []
    if as_json:
        print_json(found | ({"checks": [vars(check) for check in checks]} if verify is not None else {}))
    else:
        tree = branch = Tree(str(model))
        for step in found.get("steps", []):
            branch = branch.add(step["step"])
            for line in chain.summary(step):
                branch.add(line, style="dim")
        stdout().print(tree)
        for check in checks:
            stdout().print(
                f"{'altered' if check.wrong else 'verified'}: {check.wrong or check.what}", markup=False, soft_wrap=True
            )
    wrong = [check for check in checks if check.wrong]
    if wrong:
        raise fail(f"{model}: {wrong[0].what}: {wrong[0].wrong}; give the run that made it, or make it anew", 4)
