"""`python -m astrobiogen`: the commands of the package; `python -m astrobiogen COMMAND ...` runs one."""

import importlib
import sys

COMMANDS = {
    "train": "train a model, on the bundled data or on your own",
    "evaluate": "repeat the figures of a trained model, or score it on other data",
    "predict": "answer for new climate and network files",
    "data": "build, check, describe, export and fetch data sets",
    "validate": "hold every operator, layer, model and training curve against eager PyTorch",
    "doctor": "versions, devices, and which kernel serves which operator",
}
_MODULES = {
    "data": "astrobiogen.datatools.commands",
    "predict": "astrobiogen.predict.__main__",
    "validate": "astrobiogen.validate.__main__",
}


def run(command: str) -> int:
    """Run one command with the arguments of the process; returns its exit code."""
    module = importlib.import_module(_MODULES.get(command, f"astrobiogen.{command}"))
    return int(module.main(sys.argv[1:]) or 0)


def main() -> int:
    """Run the command that is named, or list them all."""
    given = sys.argv[1:]
    if given and given[0] in COMMANDS:
        sys.argv = [f"astrobiogen {given[0]}", *given[1:]]
        return run(given[0])
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
    text = "\n".join(["usage: python -m astrobiogen COMMAND ...  (--help after a command tells its options)", *lines])
    if given and given[0] not in ("-h", "--help"):
        sys.stderr.write(f"astrobiogen: no command {given[0]!r}\n{text}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


def train() -> int:
    """The command `astrobiogen-train`."""
    return run("train")


def evaluate() -> int:
    """The command `astrobiogen-evaluate`."""
    return run("evaluate")


def predict() -> int:
    """The command `astrobiogen-predict`."""
    return run("predict")


def data() -> int:
    """The command `astrobiogen-data`."""
    return run("data")


def validate() -> int:
    """The command `astrobiogen-validate`."""
    return run("validate")


def doctor() -> int:
    """The command `astrobiogen-doctor`."""
    return run("doctor")


if __name__ == "__main__":
    sys.exit(main())
