"""Synthetic preference data without faults, of several kinds."""

from __future__ import annotations

import numpy as np

KINDS = ("random words", "templates", "chats", "hidden reward", "short answers", "several pairs a prompt")


def clean(kind: str, seed: int, count: int = 300) -> list[dict]:
    """Pairs of a kind. Lengths and labels are independent."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(800)]
    share = 1 / np.arange(1, 801)
    share /= share.sum()

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(least, most + 1), p=share))

    rows = []
    if kind == "several pairs a prompt":
        for _ in range(count // 4):
            prompt, answers = text(5, 20), [text(10, 40) for _ in range(4)]
            order = rng.permutation(4)
            for a, b in [(0, 1), (0, 2), (1, 3), (2, 3)]:
                rows.append({"prompt": prompt, "chosen": answers[order[a]], "rejected": answers[order[b]]})
        return rows
    values = rng.normal(size=800)
    value = dict(zip(words, values - values @ share, strict=True))
    for number in range(count):
        if kind == "templates":
            topics = [str(word) for word in rng.choice(words, 6)]
            prompt = (
                f"You are a helpful assistant. Answer with care and in full sentences. Write about {' '.join(topics)}."
            )
            chosen, rejected = (
                f"Here is what I wrote about {' '.join(topics)}. I hope that you like it. {text(8, 20)}. Thank you for "
                "asking me this. Let me know if you need more of it."
                for _ in range(2)
            )
        elif kind == "short answers":
            a, b = rng.integers(1, 400, 2)
            prompt, chosen, rejected = f"What is {a} + {b}?", str(a + b), str(a + b + rng.integers(1, 9))
            if number % 3 == 0:
                prompt, chosen = f"Is {a * 1000 + b} a large number?", "Yes, it is large."
                rejected = "No, it is not."
                if rng.random() < 0.5:
                    chosen, rejected = "No.", "Yes."
            if number % 3 == 1:
                chosen, rejected = f"It is {a + b}.", f"It is {a + b + number}."
        else:
            prompt, chosen, rejected = text(5, 30), text(10, 60), text(10, 60)
            if kind == "hidden reward":
                chosen, rejected = sorted((chosen, rejected), key=lambda answer: -sum(value[w] for w in answer.split()))
        if kind == "chats":
            turns = [("user", text(3, 12)), ("assistant", text(5, 20)), ("user", prompt)]
            rows.append(
                {
                    "prompt": [{"role": role, "content": said} for role, said in turns],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
