"""The commands together, and errors of use in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .demo import demo
from .distill import distill
from .export import export
from .measure import audit, calibrate, sensitivity
from .publish import push, verify
from .transform import convert, fold, relu_ize
from .work import USE

# typer's own copy of click, or click: whichever this version of typer raises from
_ClickError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class Commands(TyperGroup):
    """Says what is wrong with a command line in one line on stderr, and exits with 2."""

    def main(  # the signature of typer's own
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _ClickError as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "hf-lambda-gelu"
            message: str = error.format_message()  # type: ignore[attr-defined]
            if not message:  # no command: the help was asked for, in effect
                typer.echo(context.get_help() if context is not None else "", err=True)
            else:
                typer.echo(f"error: {' '.join(message.split()).rstrip('.')}. See: {path} --help", err=True)
            code = USE
        except typer.Abort:
            code = 130
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf_lambda_gelu {version('hf_lambda_gelu')}")
        raise typer.Exit


@app.callback()
def _common(
    shown: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """From a pretrained GELU or SiLU network to a ReLU network that stock transformers loads.

    Models are folders of saved checkpoints or Hub names; of a Hub name the files come into the Hub's cache. Results go to
    stdout, progress and messages to stderr.

    \b
    The whole way on a tiny model, in seconds, offline:
      hf-lambda-gelu demo
    The same with your own:
      hf-lambda-gelu relu-ize your/model relu-model --calibration texts.txt --compensate least_squares
      hf-lambda-gelu verify relu-model
      hf-lambda-gelu push relu-model --repo-id you/model-relu

    Exit codes: 0 done; 1 the work failed, or the answer is no; 2 wrong use; 130 interrupted.
    """


app.command()(convert)
app.command("relu-ize")(relu_ize)
app.command()(distill)
app.command()(fold)
app.command()(audit)
app.command()(calibrate)
app.command()(sensitivity)
app.command()(verify)
app.command()(push)
app.add_typer(export, name="export")
app.command()(demo)
