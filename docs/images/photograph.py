"""Photograph the text of an explorer page, light and dark, for the README. Needs chromium.

    python scripts/explore.py RUN --text TEXT --out page.html
    python docs/images/photograph.py page.html --width 760 --height 330

Writes chunks-light.png and chunks-dark.png beside this file, with two pixels for each of the page's.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

PLAIN = """header, .names { display: none } main { padding: 0 } body { background: var(--paper); overflow: hidden }
.cell { font-size: 14.5px; line-height: 1.8; border: 0; padding: 0 6px } """
DARK = """:root { --ink: #e6edf3; --paper: #0d1117; --ground: #0d1117; --line: #30363d; --k0a: #16385a; --k0b: #1f5c96;
--k1a: #4d3a10; --k1b: #86651a;
--k2a: #17402a; --k2b: #256b45; --k3a: #4a2240; --k3b: #7a3868; color-scheme: dark }
.start > i:first-child, .inside::before { box-shadow: inset 1.5px 0 #9ecbff } .cell i.nl::before { color: #6e7681 } """


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="what scripts/explore.py wrote")
    parser.add_argument("--width", type=int, default=760, help="pixels of the page")
    parser.add_argument("--height", type=int, default=330)
    args = parser.parse_args()
    page = args.page.read_text(encoding="utf-8")
    for scheme, style in (("light", PLAIN), ("dark", PLAIN + DARK)):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "page.html"
            copy.write_text(page.replace("</style>", style + "</style>", 1), encoding="utf-8")
            out = Path(__file__).resolve().parent / f"chunks-{scheme}.png"
            flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=2"
            size = [f"--window-size={args.width},{args.height}", f"--user-data-dir={folder}/profile"]
            command = ["chromium", *flags.split(), *size, f"--screenshot={out}", copy.as_uri()]
            subprocess.run(command, check=True, capture_output=True)
            print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
