import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
SOURCES = "tilewright.csrc"  # of the C runtime
FOLDERS: dict[str, str] = {name: folder for name, folder in SETUPTOOLS["package-dir"].items() if name != SOURCES}


def modules() -> dict[str, Path]:
    """Every Python file under the mapped folders by its path in the package, tilewright/codegen/model.py and so on."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}": file
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    found = {str(Path(name).parent).replace("/", ".") for name in modules()}
    assert found == {package for package in SETUPTOOLS["packages"] if not package.startswith(SOURCES)}


def test_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools leaves its work in the tree, and would ship what it finds there
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    shutil.copytree(ROOT / "runtime", source / "runtime")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    records = {f"tilewright/tuning_logs/{file.name}" for file in (ROOT / "tuning_logs").glob("*.json*")}
    recipes = {f"tilewright/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "pipeline").rglob("*.yaml")}
    runtime = {
        f"tilewright/csrc/{file.relative_to(ROOT / 'runtime').as_posix()}" for file in (ROOT / "runtime").rglob("*.[ch]")
    }
    library = "tilewright/lib/libtilewright.so"
    assert wheel.name.endswith("-py3-none-manylinux_2_17_x86_64.whl")
    data = {"tilewright/py.typed", library, "tilewright/schedules/rates.json", *records, *recipes, *runtime}
    assert held == {*modules(), *data}


def test_typings_links_match_the_package() -> None:
    typings = ROOT / "typings" / "tilewright"
    expected = {package.rpartition(".")[2]: ROOT / folder for package, folder in FOLDERS.items() if "." in package}
    for file in (ROOT / "tilewright").iterdir():
        if file.name == "py.typed" or file.suffix == ".py" or (file.is_dir() and file.name not in ("__pycache__", "lib")):
            expected[file.name] = file
    assert {link.name: link.resolve() for link in typings.iterdir() if link.name != "__pycache__"} == expected
    for link in typings.iterdir():
        assert link.is_symlink() and not link.readlink().is_absolute()
