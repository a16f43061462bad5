"""Figures of this machine that have become old are measured again before they are asked for."""

from fiddler.cli.console import note


def renew_calibration(*, only_with_gpu: bool = False) -> None:
    """Calibrate again if that was done with other versions, or on other hardware only.

    Who has never calibrated is not made to wait. Where it cannot be done, or is interrupted, that
    is said, and whoever wants the figures does without them.
    """
    from fiddler._version import __version__
    from fiddler.cli.calibrate import measure
    from fiddler.errors import FiddlerError
    from offload.calibration import Calibration, default_path, locked
    from offload.hardware import probe
    from offload.machine_facts import settings_of, this_machine
    from offload.machine_rates import RATES

    if not default_path().exists():
        return
    hardware = probe("auto")
    if only_with_gpu and not hardware.has_gpu:
        return
    calibration = Calibration(default_path(), this_machine(hardware, __version__))
    if not calibration.is_outdated(RATES):
        return
    why = calibration.why_unknown(RATES, settings_of(hardware))
    note(f"{why}: calibrating, which takes a minute (Ctrl-C leaves it for another time)")
    try:
        with locked(default_path().with_name("measuring")):  # two at once would measure each other
            if calibration.is_outdated(RATES):
                measure()
    except KeyboardInterrupt:
        note("not calibrated")
    except (FiddlerError, RuntimeError, OSError, MemoryError) as error:
        note(f"not calibrated: {error}")
