"""An audit with every kind of block and with texts that try to act."""

import math

import numpy as np

from lit_did.audit.blocks import (
    HeatMaps,
    HeatPair,
    HeatToken,
    PairList,
    Paragraph,
    Picture,
    ScoredPair,
    ScoredPairs,
    ScoredSide,
    SideBySide,
    Table,
)
from lit_did.audit.page import pictures
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.running import Audit
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData

HOSTILE = "</script><script>window.ran = true</script><!-- <img src=x onerror='window.ran = true'> \" & \x07\u202eevil"
TOWN = "The river runs past the old mill and the children wave from the bridge"


def example() -> Audit:
    rows = [
        {"prompt": f"How far is town {i}?", "chosen": f"It is {i} miles.\nTake the bus.", "rejected": "No idea. " * 9}
        for i in range(80)
    ]
    rows[3] = {"prompt": HOSTILE, "chosen": HOSTILE + "!", "rejected": "x" * 1_000_000}
    rows[4] = {"prompt": "مرحبا", "chosen": "العربية abc", "rejected": "שלום"}
    rows[5] = {"prompt": "Nothing?", "chosen": "", "rejected": "b"}
    found = Audit(AuditData(rows, "pairs"), Settings(), inputs={"pairs": "towns.jsonl", "reference": "smollm2"})
    numbers = [row for row in range(80) if row != 5]
    sentence = "{} pairs (0.33 ± 0.05) contradict another pair of the same prompt."
    found.parts["data"] = Part(
        "data",
        "The data",
        "What the pairs hold, without any model.",
        [
            Finding(
                "contradictions",
                sentence.format(70),
                "Keep one of each.",
                True,
                0.3,
                numbers[:70],
                evidence={3: HOSTILE + "\ud800"},
            ),
            Finding("unusable", "One row has an empty completion.", "Write one or drop the row.", True, 0.1, [5]),
            Finding("length_bias", "The longer side is chosen in 0.52 (0.47 to 0.57) of the pairs.", "", False, 0.0),
        ],
        [
            Paragraph("A paragraph that holds <script>window.ran = true</script>."),
            Table(
                "Accuracy of simple rules",
                ["", "accuracy", "pairs whose chosen side is longer than the rejected one, by the rule", "remark"],
                [
                    ["longer side", Estimate(0.64, 0.6, 0.68, 80), 80, "b10"],
                    ["unknown", Estimate(math.nan), None, None],
                    ["bag of words", Estimate(0.71, 0.65, 0.77, 80), 1234, "b9"],
                    ["<b>lists</b>", Estimate(-0.5), 7, "a"],
                ],
                "Intervals are over prompts.",
            ),
            Picture(
                "Length", pictures.histogram({"chosen": np.arange(99), "rejected": np.arange(50)}, "words"), "Lengths."
            ),
            Picture(
                "Rules", pictures.bars(["longer", "words"], [0.6, Estimate(0.7, 0.6, 0.8)], "accuracy", 0.5), "Rules."
            ),
            PairList("Odd pairs", [3, 4], {3: HOSTILE}, "Look at them."),
        ],
    )
    side = ScoredSide(
        "chosen",
        [
            ("control", "<s>"),
            ("prompt", HOSTILE),
            ("header", "assistant:\n"),
            ("think", "hmm"),
            ("scored", "It is\n3 miles"),
            ("not scored", "\n"),
            ("cut", " and more"),
        ],
    )
    found.parts["tokens"] = Part(
        "tokens", "Tokens", "What is scored.", blocks=[ScoredPairs("As scored", [ScoredPair(3, [side, side], "Cut.")])]
    )
    drawn = np.random.default_rng(0)
    texts = [" " + word for word in TOWN.split()] + ["\n", "</script>", "\u202e\ud800"]
    tokens = [
        HeatToken(
            text,
            {"log-ratio (nats)": float(drawn.normal()), "token DID entropy (nats)": float(drawn.random() * 5)},
            {name: [("</script>", 0.5), (" the", 0.2), ("\n", 1e-9)] for name in ("policy", "reference", "DID")},
        )
        for text in texts * 3
    ]
    tokens[1] = HeatToken(" nan", {"log-ratio (nats)": math.nan}, {})
    found.parts["policy"] = Part(
        "policy",
        "The policy",
        "What it learned.",
        [Finding("side_of_margin", "61% of the margin comes from rejected completions.", "Watch it.", False, 0.6, [1])],
        [
            HeatMaps(
                "Token heat maps", [HeatPair(3, HOSTILE, {"chosen": tokens, "rejected": tokens[:30]}, "Most learned")]
            ),
            SideBySide("Samples", [(HOSTILE, {"policy": "It is 3 miles.", "reference": HOSTILE})]),
            Picture(
                "Where it lies", pictures.position(Estimate(0.3, 0.1, 0.5), "reinforcing", "exploring"), "Position."
            ),
        ],
    )
    return found
