"""`tilewright run`: an artifact on texts or on arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.output import IsaLevel, Json, Threads, print_json, stdout, table
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tilewright.engine import Engine
    from tilewright.manifest import Head
    from tilewright.results import Tokens

    Arrays = Mapping[str, NDArray[np.generic]]


def run(
    artifact: Annotated[Path, typer.Argument(help="Directory that `tilewright compile` wrote.")],
    text: Annotated[list[str] | None, typer.Option(help="A text (or the question about --context); repeatable.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="Second text that goes with the --text in the same place; repeatable.")
    ] = None,
    source: Annotated[Path | None, typer.Option("--input", help="File.npz with input_ids and other inputs.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File.npz to write all outputs to.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    threads: Threads = None,
    isa: IsaLevel = None,
    as_json: Json = False,
) -> None:
    """Run an artifact and print what its head says about each sequence."""
    if bool(text) == bool(source):
        raise InvalidInput("give either --text (repeatable) or --input FILE.npz")
    if context and len(context) != len(text or ()):
        raise InvalidInput(f"{len(text or ())} --text and {len(context)} --context were given; they go in pairs")
    if output is not None and not output.parent.is_dir():
        raise InvalidInput(f"cannot write {output}: {output.parent} is not a directory")
    from tilewright.commands.arrays import read_arrays, write_arrays
    from tilewright.engine import load
    from tilewright.results import read

    engine = load(artifact, threads, isa)
    if source is not None:
        inputs: Arrays = read_arrays(source, [tensor.name for tensor in engine.inputs])
        outputs = engine(**inputs)
        sequences = _sequences(inputs)
    else:
        texts = list(zip(text or (), context, strict=True)) if context else [(one,) for one in text or ()]
        plain: Any = texts if context else text
        inputs = engine.tokenize(plain, truncate=truncate)
        outputs = engine(**inputs)
        sequences = _sequences(inputs, texts, _encode(artifact, engine, plain, truncate))
    if output is not None:
        write_arrays(output, outputs)
    head, results = engine.manifest.head, read(engine.manifest, outputs, sequences)
    if as_json:
        shapes = {name: list(array.shape) for name, array in outputs.items()}
        print_json(
            {
                "artifact": str(artifact),
                "isa": engine.level.name,
                "kind": head.kind,
                "problem_type": head.problem_type,
                "outputs": shapes,
                "results": results,
            }
        )
    else:
        _print(head, results, outputs)


def _encode(artifact: Path, engine: Engine, texts: Any, truncate: bool) -> list[Any]:
    """The encodings behind `engine.tokenize`, for tokens and their places in the text."""
    from tokenizers import Tokenizer

    from tilewright.manifest import TOKENIZER

    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER))
    tokenizer.no_padding()
    if truncate:
        tokenizer.enable_truncation(engine.manifest.limits.max_positions)
    else:
        tokenizer.no_truncation()
    return list(tokenizer.encode_batch(list(texts)))


def _sequences(inputs: Arrays, texts: list[Any] | None = None, encodings: list[Any] | None = None) -> list[Tokens]:
    import numpy as np

    from tilewright.results import Tokens

    ids = inputs["input_ids"]
    mask = np.asarray(inputs.get("attention_mask", np.ones(ids.shape)), bool)
    rows = []
    for row in range(len(ids)):
        columns = np.flatnonzero(mask[row])
        texts_and_encoding = (texts[row], encodings[row]) if texts and encodings else ((), None)
        rows.append(Tokens(columns, ids[row][columns].tolist(), *texts_and_encoding))
    return rows


def _print(head: Head, results: list[dict[str, Any]], outputs: Arrays) -> None:
    console, kind = stdout(), head.kind
    for number, result in enumerate(results):
        title = " | ".join(result.get("texts", ())) or f"sequence {number} ({result['tokens']} tokens)"
        console.print(title, markup=False, style="bold")
        if kind == "question_answering":
            answer = result.get("answer", f"tokens {result['start_token']} to {result['end_token']}")
            console.print(f"  {answer} ({result['probability']:.1%})", markup=False)
        elif kind == "sequence_classification":
            console.print(f"  {_verdict(result)}", markup=False)
        elif kind == "token_classification":
            grid = table("token", "label", "probability", left=2)
            for tag in result["labels"]:
                if not tag.get("special"):
                    grid.add_row(str(tag.get("token", tag["id"])), tag["label"], f"{tag['probability']:.1%}")
            console.print(grid)
        elif kind == "embedding":
            shown = ", ".join(f"{value:.4f}" for value in result["embedding"][:6])
            console.print(f"  {len(result['embedding'])} dimensions: {shown}, ...", markup=False)
    if kind == "embedding" and len(results) > 1:
        _print_similarities(outputs)
    if kind == "raw":
        for name, array in outputs.items():
            console.print(f"{name}: {array.dtype} {array.shape}", markup=False)


def _verdict(result: dict[str, Any]) -> str:
    """The class, the classes or the scores of a sequence, whichever its head gives."""
    if "label" in result:
        return f"{result['label']} ({result['probability']:.1%})"
    if "probabilities" in result:
        return ", ".join(f"{label} ({result['probabilities'][label]:.1%})" for label in result["labels"]) or "no label"
    if "score" in result:
        return f"{result['score']:.4f}"
    return ", ".join(f"{label} {value:.4f}" for label, value in result["scores"].items())


def _print_similarities(outputs: Arrays) -> None:
    import numpy as np

    vectors = np.asarray(outputs["sentence_embedding"], np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    grid = table("cosine", *(str(i + 1) for i in range(len(vectors))))
    for number, row in enumerate(vectors @ vectors.T):
        grid.add_row(str(number + 1), *(f"{value:.3f}" for value in row))
    stdout().print(grid)
