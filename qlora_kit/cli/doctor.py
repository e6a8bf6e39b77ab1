"""`qlora-kit doctor`: is this machine and this installation fit to train, and if not, why.

Each line is `ok`, `note` (works, worth knowing) or `FAIL` (something will not
work), with what to do about it. The self-test is small but real: known NF4
codes, and every available backend of every op and every strategy of `nf4_linear`
against float64 arithmetic, bit for bit where the format says so. What cannot be
tested on a machine is named.
"""

from collections.abc import Sequence

from qlora_kit.cli.arguments import Parser
from qlora_kit.cli.checks import Check, check_environment, check_storage, check_torch
from qlora_kit.cli.kernel_checks import check_ops, check_resources, check_sources
from qlora_kit.cli.logs import setup_logging

_ABOUT = """\
Check this machine and this installation: Python, torch, GPU and driver,
package versions, caches, how each CUDA kernel compiles and what it takes of
the GPU; and test the 4-bit codec, every op and every strategy. Include the
output when you report a problem."""
_EPILOG = "exit code: 0 when everything works, 2 when something has to be repaired"


def run(argv: Sequence[str]) -> int:
    """Check; see `qlora-kit doctor --help`.

    Args:
        argv: the words after `qlora-kit doctor`.

    Returns:
        0, or 2 if a check failed.
    """
    Parser("doctor", "", _ABOUT, _EPILOG).parse_args(argv)
    setup_logging()
    failed = 0
    for title, checks in (
        ("environment", check_environment),
        ("torch and devices", check_torch),
        ("storage", check_storage),
        ("kernels", check_sources),
        ("ops and self-test", check_ops),
        ("registers and shared memory", check_resources),
    ):
        heading = f"# {title}"
        for check in checks():
            if heading:
                print(heading)
            heading = ""
            _print(check)
            failed += check.status == "FAIL"
        if not heading:
            print()
    if failed:
        print(f"{failed} of the checks failed: see the lines marked FAIL")
        return 2
    print("everything works")
    return 0


def _print(check: Check) -> None:
    print(f"  {check.status:<5} {check.name:<18} {check.found}")
    if check.advice:
        print(f"        {'':<18} -> {check.advice}")
