"""The picture at the top of the README: the head of a report on two runs of the real model, with
one prompt answered by the base, after plain fine-tuning and after the run that was held.

    forgetless chat out/real/kept-1-2-0 --prompts prompts.jsonl --out kept.jsonl --temperature 0
    forgetless chat out/real/plain-0 --prompts prompts.jsonl --out plain.jsonl --temperature 0
    python experiments/picture.py out/real/kept-1-2-0 out/real/plain-0 kept.jsonl plain.jsonl

The runs are those of experiments/real.py. It writes docs/report.png: the page of `forgetless
report`, without the sentences that say its two numbers again, as headless Chromium shows it, cut
below the conversation. It needs Chromium and Pillow beside forgetless.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

from forgetless.report.against_plain import against_plain, with_conversations
from forgetless.report.contents import load_contents
from forgetless.report.page import write_report

OUT = Path(__file__).parents[1] / "docs" / "report.png"
# The window, and twice as many pixels of it, so that text stays sharp.
WIDTH, HEIGHT, SHARPER = 1100, 985, 1.5
# The title, what stands below it, and the prompt of which the answers are shown.
TITLE = "A chat model on medical questions"
MODEL = "SmolLM2-135M-Instruct, 50 steps of 8 rows"
ASKED = "What colour is the sky?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("run", "plain", "pairs", "plain_pairs"):
        parser.add_argument(name)
    given = parser.parse_args()
    contents = against_plain(load_contents(given.run), Path(given.run), Path(given.plain))
    contents = with_conversations(contents, [given.pairs, given.plain_pairs])
    shown = [sample for sample in contents.samples if ASKED in str(sample.prompt)]
    contents = replace(contents, title=TITLE, samples=shown[:1], verdict=[], model=MODEL)
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(contents, Path(folder) / "report.html")
        _photograph(page, Path(folder) / "page.png")
        image = Image.open(Path(folder) / "page.png").convert("RGB")
        image.quantize(64).save(OUT, optimize=True)
    print(OUT, *image.size, OUT.stat().st_size, "bytes")


def _photograph(page: Path, picture: Path) -> None:
    """What headless Chromium shows of a page."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SHARPER}"]
    words += [f"--user-data-dir={picture.parent / 'profile'}", f"--screenshot={picture}"]
    subprocess.run([*words, page.resolve().as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
