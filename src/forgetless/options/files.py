"""Options of the verbs that take an importance file: inspect and convert."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.options.option import RUNNING, option

# What may be given wherever an importance file is taken.
FILE = "importance file, its folder or a Hub name"


@dataclass(frozen=True)
class InspectOptions:
    """Options of `forgetless inspect`: what is in an importance file."""

    file: str = option("", FILE, group="data", positional=True, metavar="FILE", reads=True)


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `forgetless convert`: an importance file in another form."""

    file: str = option("", FILE, group="data", positional=True, metavar="FILE", reads=True)
    tier: str = option(
        "", "f32, bf16, u8, u4, factored[:K], kronecker[:K]", group="output", metavar="TIER"
    )
    out: str = option(
        "", "importance file to write", group="output", decides=RUNNING, metavar="FILE"
    )
