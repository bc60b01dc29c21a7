"""Handwritten digits on several machines, no machine seeing more than its own share of the ten classes.

    mesh run examples/digits.py --shard 1/2        # machine 1 trains on the digits 0 2 4 6 8
    mesh run examples/digits.py --shard 2/2        # machine 2 trains on the digits 1 3 5 7 9

    mesh sim -n 5 --evaluate evaluate examples/digits.py --shard {rank}/{nodes} --steps 400
                                                   # five virtual machines in one process

Shard i of n holds the digits i - 1, i - 1 + n, ...; i counts from 1, and 1/1, the default, is all ten.
Both end with one model that reads all ten digits; alone, each would at best know its own. Printed is
the accuracy on test digits of all ten classes, of the mesh's averaged weights and of this machine's.
What makes a training loop part of a mesh is marked (1) and (2); the rest is an ordinary script.
"""

import argparse
import functools
import sys
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import mesh

BATCH = 32
REPORT_S = 2.0


@functools.cache
def load(shard):
    """(x, y) to train on: this shard's classes; (x, y) to test on: all classes, on every machine."""
    i, n = shard
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    y, test_y = (torch.tensor(part) for part in split[2:])
    mine = y % n == i - 1
    return x[mine], y[mine], test_x, test_y


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


def evaluate(model):
    """For `mesh sim --evaluate evaluate`."""
    _, _, test_x, test_y = load((1, 1))
    return accuracy(model, test_x, test_y)


def parse_shard(text):
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n <= 10:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shard of ten classes: write i/n with 1 <= i <= n <= 10, for example "
            "1/2 on one machine and 2/2 on the other"
        )
    return i, n


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shard", type=parse_shard, default=(1, 1), metavar="I/N", help="share of the classes")
    add("--seconds", type=float, default=20.0, help="how long to train (default 20)")
    add("--steps", type=int, help="how many steps, instead; a faster machine then ends sooner")
    add("--every", type=int, default=4, help="steps between hand-overs (default 4)")
    add("--lr", type=float, default=0.2, help="at the start, 0 at the end (default 0.2)")
    add("--seed", type=int, default=0)
    add("--wait", type=float, default=60.0, help="seconds for the other shards (default 60)")
    return parser.parse_args()


def train(node, model, optimizer, data, arguments):
    x, y, test_x, test_y = data

    def report():
        live = accuracy(model, test_x, test_y)
        with node.averaged():
            averaged = accuracy(model, test_x, test_y)
        print(f"step {step:6}  averaged {averaged:6.1%}  live {live:6.1%}", flush=True)

    step, done, began = 0, 0.0, time.monotonic()
    report_at = began + REPORT_S
    while done < 1:
        # A rate that ends at 0: what the last machine still learns alone then changes nothing.
        optimizer.param_groups[0]["lr"] = arguments.lr * (1 - done)
        chosen = torch.randint(len(x), (BATCH,))
        loss = torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        node.step(loss=loss.item(), samples=BATCH)  # (2) after each optimizer.step()

        step += 1
        now = time.monotonic()
        if arguments.steps:
            done, due = step / arguments.steps, step % max(1, arguments.steps // 10) == 0
        else:
            done, due = (now - began) / arguments.seconds, now >= report_at
        if due and done < 1:
            report()
            report_at = time.monotonic() + REPORT_S
    report()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the model is tiny: a second thread only costs
    torch.manual_seed(arguments.seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr)
    data = load(arguments.shard)
    with mesh.join(model, optimizer, run="digits", every=arguments.every) as node:  # (1)
        # Shards need one another, as a network that sees only some classes forgets the rest. Where
        # every machine has data of all kinds there is nothing to wait for.
        try:
            node.wait_for_peers(arguments.shard[1] - 1, timeout=arguments.wait)
        except mesh.PeersMissing as missing:
            print(f"training without the other shards: {missing}", file=sys.stderr)
        train(node, model, optimizer, data, arguments)


if __name__ == "__main__":
    main()
