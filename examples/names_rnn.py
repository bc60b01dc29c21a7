"""A character RNN learns from which of 18 languages a surname comes, each machine from its own share.

    python examples/names_rnn.py --data names --alone          # the reference: one process, all names
    mesh run examples/names_rnn.py --data names --shard 1/2    # machine 1
    mesh run examples/names_rnn.py --data names --shard 2/2    # machine 2

The network, the data and the training (one name at a time, plain SGD) are those of the PyTorch
tutorial that was once trained federated on two Raspberry Pis. `--shard i/n` is the hard case: machine
i sees languages i, i + n, ... and never a name of the others, yet all end with one model of all 18.
That takes an exchange at every step; `--even` deals every language out evenly, and an exchange every
8 steps is enough. As a step is shared by n machines, it is n times as long: `--lr` 0.005 n.
What makes a training loop part of a mesh is marked (1) and (2).
"""

import argparse
import contextlib
import json
import random
import string
import sys
import time
import unicodedata
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import mesh

LETTERS = string.ascii_letters + " .,;'"
ONE_HOT = torch.eye(len(LETTERS))
HIDDEN = 128
EXAMPLES = 2000
JUDGED = 10
"""One name at a time makes a noisy model: from one name to the next its accuracy moves by 2 points. So
the result is the mean of 10 evaluations, of 2000 names each, during the last tenth of the training."""

GONE_S = 3.0
"""So long the other machines may be away, on a bad Wi-Fi, before this one stops as well: in 75 names
alone the model went from NLL 2.11 to 2.35, as it forgot the languages that it does not see."""

WHERE_DATA_IS = """--data DIR names a folder with one file of names a language (Arabic.txt, ...), such as
data/names of https://github.com/spro/practical-pytorch (MIT), the "names" data of its tutorial."""


class RNN(torch.nn.Module):
    """The tutorial's cell: hidden' = i2h([letter, hidden]), answer = i2o([last letter, hidden])."""

    def __init__(self, languages):
        super().__init__()
        self.i2h = torch.nn.Linear(len(LETTERS) + HIDDEN, HIDDEN)
        self.i2o = torch.nn.Linear(len(LETTERS) + HIDDEN, languages)

    def forward(self, letters):
        """letters: (length, names, 57), one-hot -> log-probabilities (names, languages)."""
        hidden = torch.zeros(letters.shape[1], HIDDEN)
        for letter in letters[:-1]:
            hidden = self.i2h(torch.cat((letter, hidden), 1))
        return torch.log_softmax(self.i2o(torch.cat((letters[-1], hidden), 1)), dim=1)


def read_names(folder):
    """{language: names} of a folder with one Language.txt each, in ASCII, without empty lines."""
    data = {}
    for path in sorted(folder.glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        names = [name for name in map(to_ascii, lines) if name]
        if names:
            data[path.stem] = names
    return data


def to_ascii(name):
    """'Ślusàrski' -> 'Slusarski': accents are characters of their own in NFD, and left out."""
    return "".join(c for c in unicodedata.normalize("NFD", name.strip()) if c in LETTERS)


def shard_of(data, shard, even):
    """This machine's share of the data: languages i, i + n, ..., or a part of every language."""
    i, n = shard
    if even:
        return {language: names[i - 1 :: n] or names for language, names in data.items()}
    return {language: data[language] for language in list(data)[i - 1 :: n]}


def draw(data, rng):
    """One example as the tutorial draws it: a language uniformly, then a name of it."""
    language = rng.choice(list(data))
    return rng.choice(data[language]), language


def encode(names):
    """Names of one length -> (length, names, 57)."""
    return ONE_HOT[torch.tensor([[LETTERS.index(c) for c in name] for name in names]).T]


@torch.no_grad()
def evaluate(model, examples, languages):
    """(mean NLL, part right) over (name, language) pairs, names of one length at a time."""
    by_length = {}
    for name, language in examples:
        by_length.setdefault(len(name), []).append((name, languages.index(language)))
    loss, right = 0.0, 0
    for group in by_length.values():
        answer = model(encode([name for name, _ in group]))
        target = torch.tensor([index for _, index in group])
        loss += torch.nn.functional.nll_loss(answer, target, reduction="sum").item()
        right += (answer.argmax(1) == target).sum().item()
    return loss / len(examples), right / len(examples)


def parse_shard(text):
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shard: write i/n, for example 1/2 on one machine and 2/2 on the other"
        )
    return i, n


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with one Language.txt each")
    add("--shard", type=parse_shard, default=(1, 1), metavar="I/N", help="share of the languages")
    add("--even", action="store_true", help="share the names of every language out instead")
    add("--every", type=int, help="names between exchanges (default 1, with --even 8)")
    add("--patience", type=float, help="seconds to wait for each (default 1, with --even 0)")
    add("--lr", type=float, help="default 0.005 times the machines")
    add("--names", type=int, default=10_000, help="to train on, on all machines together (10000)")
    add("--seed", type=int, default=1)
    add("--wait", type=float, default=60.0, help="seconds for the other shards (default 60)")
    add("--alone", action="store_true", help="without a mesh: the reference")
    add("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.exit(2, f"{parser.prog}: {WHERE_DATA_IS}\n")
    uneven = not arguments.even
    for flag, value in (
        ("every", 1 if uneven else 8),
        ("patience", 1.0 if uneven else 0.0),
        ("lr", 0.005 * arguments.shard[1]),
    ):
        if getattr(arguments, flag) is None:
            setattr(arguments, flag, value)
    return arguments


def left_alone(node, others):
    """Whether the other machines have ended: from here on, this one would forget their languages."""
    if node.peers >= others:
        return False
    try:
        return not node.wait_for_peers(others, timeout=GONE_S)
    except mesh.MeshError as error:
        print(f"stopping, as this machine alone would forget the other languages: {error}")
        return True


def train(model, optimizer, mine, languages, arguments, node, judge):
    """Trains on names of `mine`, one at a time. Returns on how many, and what judge() said."""
    rng = random.Random(f"{arguments.seed} {arguments.shard}")
    others = 0 if node is None or arguments.even else arguments.shard[1] - 1
    last = arguments.names // arguments.shard[1]
    judge_at = {last // 2, *(last - k * max(1, last // 100) for k in range(JUDGED))}
    judgements = []
    for k in range(1, last + 1):
        name, language = draw(mine, rng)
        target = torch.tensor([languages.index(language)])
        loss = torch.nn.functional.nll_loss(model(encode([name])), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if node is not None:
            node.step(loss=loss.item(), samples=1)  # (2) after each optimizer.step()
            if k > arguments.every and left_alone(node, others):
                return k, judgements
        if k in judge_at:
            with contextlib.nullcontext() if node is None else node.averaged():
                judgements.append(judge(model))
        if k == last // 2:
            nll, right = judgements.pop()
            print(f"after {k} names: NLL {nll:.3f}, {right:.1%} right", flush=True)
    return last, judgements


def main():
    arguments = parse_arguments()
    data = read_names(arguments.data)
    languages = list(data)
    mine = shard_of(data, arguments.shard, arguments.even)
    if not mine:
        sys.exit(f"{len(data)} languages in {arguments.data}: none for this shard. {WHERE_DATA_IS}")
    print(f"training on {len(mine)} of {len(data)} languages: {', '.join(mine)}", flush=True)
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only costs
    torch.manual_seed(arguments.seed)
    rng = random.Random(0)  # whatever --seed and --shard are, all are judged by the same names
    examples = [draw(data, rng) for _ in range(EXAMPLES)]
    judge = partial(evaluate, examples=examples, languages=languages)

    model = RNN(len(languages))
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr)
    with contextlib.ExitStack() as stack:
        node = None
        if not arguments.alone:
            every, patience = arguments.every, arguments.patience
            joined = mesh.join(model, optimizer, run="names", every=every, patience=patience)  # (1)
            node = stack.enter_context(joined)
            node.wait_for_peers(arguments.shard[1] - 1, timeout=arguments.wait)
        began = time.monotonic()
        trained, judgements = train(model, optimizer, mine, languages, arguments, node, judge)
        seconds = time.monotonic() - began
        figures = asdict(node.statistics()) if node else {}
    judgements = judgements or [judge(model)]
    nll, right = (sum(values) / len(judgements) for values in zip(*judgements, strict=True))
    print(f"after {trained} names in {seconds:.1f} s: NLL {nll:.3f}, {right:.1%} right")
    if arguments.json:
        figures |= {"nll": nll, "right": right, "names": trained, "seconds": seconds}
        print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main()
    except mesh.MeshError as error:  # nobody came, no node could be started: it says what to do
        sys.exit(f"names_rnn: {error}")
