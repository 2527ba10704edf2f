"""Takes a state file up in a process of its own and goes on: `resume.py MODEL STATE TEXT`.

Prints as JSON what the session writes next, and the logits after reading TEXT.
"""

from __future__ import annotations

import json
import sys

import fastweights

WRITTEN = 400
TEMPERATURE = 0.8


def go_on(session: fastweights.Session, text: bytes) -> dict[str, str]:
    """Writes on, reads `text`; returns the bytes written and the logits' bits, in hexadecimal."""
    written = session.write(max_tokens=WRITTEN, temperature=TEMPERATURE, seed=1)
    session.read(text)
    return {
        "written": written.encode("utf-8", "surrogateescape").hex(),
        "logits": session.logits().numpy().tobytes().hex(),
    }


if __name__ == "__main__":
    model_path, state_path, text_path = sys.argv[1:]
    resumed = fastweights.Session.load(state_path, fastweights.load_model(model_path))
    with open(text_path, "rb") as file:
        print(json.dumps(go_on(resumed, file.read())))
