"""``fiddler pull``: bring a model's files into the cache, and say where they are."""

import click

from fiddler.cli.options import model_argument


@click.command()
@model_argument()
@click.option("--revision", metavar="REV", help="Branch, tag or commit.")
@click.option("--token", metavar="TOKEN", help="Access token of the hub; default: HF_TOKEN.")
@click.option("--offline", is_flag=True, help="Only check that everything is already here.")
def command(model: str, revision: str | None, token: str | None, offline: bool) -> None:
    """Download MODEL, which is ORG/NAME[@REVISION], and print its folder.

    Its size is checked against the free disk space first; an interrupted download goes on where it
    stopped.
    """
    from fiddler.cli.console import note
    from fiddler.hub import resolve_model
    from fiddler.progress import progress_bars

    with progress_bars() as progress:
        found = resolve_model(
            model, revision=revision, token=token, offline=offline, progress=progress
        )
    if found.revision:
        note(f"{found.name} at {found.revision}")
    click.echo(found.path)
