"""Train the projector and the decoder of the small LLaVA on generated scenes, over cached CLIP features.

    python evidence/train_small_llava.py features     # once; a quarter of a second per image on two cores
    python evidence/train_small_llava.py train        # 50 minutes on two cores
    python evidence/train_small_llava.py score        # held-out scenes, with and without the picture

The tower is frozen. Questions about one scene share its visual tokens: they stand side by side in one sequence, each seeing
the picture and itself, at the positions they would have alone, so a step trains exactly the single-question model.

Three stages. The decoder learns the language on scenes told in words (there is no pretrained one of this size to start
from); then, as LLaVA has it, the projector learns to say patch by patch what the decoder can read; then both learn to answer
about pictures.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saint.lab import demo
from saint.lab.demo import scenes, small_llava
from saint.lab.demo.easy_vqa import easy_vqa
from saint.lab.records import environment, write_json

EASY = {"train": 600, "test": 200}  # pictures of easy-VQA
TOLD = 2_000_000  # first seed of the scenes that are told in words
HERE = Path(__file__).parent
WEIGHTS = Path(small_llava.__file__).with_name("small_llava.safetensors")
IDS = {word: i for i, word in enumerate(small_llava.VOCABULARY)}


def features(options: argparse.Namespace) -> None:
    """Tower features as LLaVA uses them (layer -2, without CLS), float16 [pictures, 196, 768]."""
    options.folder.mkdir(parents=True, exist_ok=True)
    info = demo.MODELS["clip-b16"]
    tower = small_llava.blank(info.load()).model.vision_tower
    held, seen = range(scenes.HELD_OUT, scenes.HELD_OUT + options.held), range(options.images)
    easy = [picture for split, count in EASY.items() for picture, _ in easy_vqa(split, count)]
    extract(tower, options.folder / "easy.npy", len(easy), lambda i: info.preprocess(easy[i]))
    seeds = [*held, *seen]
    extract(tower, options.folder / "f.npy", len(seeds), lambda i: info.preprocess(scenes.scene(seeds[i]).image()))


def extract(tower: Any, file: Path, count: int, picture: Callable[[int], Tensor]) -> None:
    """Fill ``file``; one that was cut off goes on where it stopped. How far it is stands beside it, in ``.done``."""
    counter, shape = file.with_suffix(".done"), (count, small_llava.IMAGE_TOKENS, 768)
    there = int(counter.read_text()) if counter.exists() else 0
    out = np.lib.format.open_memmap(file, "r+" if there else "w+", np.float16, None if there else shape)
    if out.shape != shape:
        raise SystemExit(f"{file} holds {out.shape}, asked for {shape}: remove it or ask for the same numbers")
    start = time.time()
    with torch.inference_mode():
        for i in range(there, count, 8):
            pixels = torch.stack([picture(j) for j in range(i, min(i + 8, count))])
            found = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            out[i : i + len(found)] = found.half().numpy()
            if i // 8 % 10 == 9 or i + 8 >= count:
                out.flush()
                counter.write_text(str(i + len(found)))
                print(f"{i + len(found)} of {count}, {(time.time() - start) / (i + 8 - there):.3f} s each", flush=True)


def encode(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


# -- one sequence for all questions about a scene ---------------------------------------------------------------------------


def pack(batch: list[list[scenes.Question]], seen: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Questions of each scene side by side.

    Args:
        seen: positions of the N visual tokens, [B, N].
        room: length of the text of a row, the same for every batch, so that a compiled step stays compiled.

    Returns:
        ids [B, room], positions [B, N + room], attention bias [B, 1, N + room, N + room], labels [B, room] (-100: no loss).
    """
    rows, visual = len(batch), seen.shape[1]
    ids, labels = torch.zeros(rows, room, dtype=torch.long), torch.full((rows, room), -100)
    positions = torch.cat([seen, torch.zeros(rows, room, dtype=torch.long)], 1)
    owners = torch.full((rows, visual + room), -1)
    owners[:, visual:] = -2  # padding
    for b, questions in enumerate(batch):
        at = 0
        for number, question in enumerate(questions):
            asked, answer = encode(question.text), [*encode(question.answer), IDS["</s>"]]
            span = slice(at, at + len(asked + answer))
            ids[b, span] = torch.tensor(asked + answer)
            labels[b, span] = torch.tensor([-100] * (len(asked) - 1) + answer + [-100])  # the next token at each place
            positions[b, visual:][span] = torch.arange(len(asked + answer)) + small_llava.IMAGE_TOKENS
            owners[b, visual:][span] = number
            at = span.stop
    same = (owners.unsqueeze(1) == owners.unsqueeze(2)) | (owners.unsqueeze(1) == -1)  # everyone sees the picture
    hidden = ~(same & torch.ones(visual + room, visual + room, dtype=torch.bool).tril()).unsqueeze(1)
    return ids, positions, torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min), labels


def answers(
    decoder: Any, visual: Tensor, seen: Tensor, batch: list[list[scenes.Question]], room: int
) -> tuple[Tensor, Tensor]:
    """Logits [B, room, V] and labels [B, room] of the packed text behind visual tokens [B, N, C]."""
    ids, positions, bias, labels = pack(batch, seen, room)
    words = decoder.embed_tokens.weight  # tied
    hidden = decoder(
        inputs_embeds=torch.cat([visual, words[ids]], 1), attention_mask=bias, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden[:, visual.shape[1] :] @ words.T, labels


def marks(logits: Tensor, labels: Tensor, batch: list[list[scenes.Question]]) -> dict[str, list[bool]]:
    """Exact match by category; teacher forced, which for an exact match is the same as greedy."""
    wrong = (logits.argmax(-1) != labels) & (labels != -100)
    found: dict[str, list[bool]] = {}
    for b, questions in enumerate(batch):
        at = 0
        for question in questions:
            length = len(encode(question.text)) + len(encode(question.answer)) + 1
            found.setdefault(question.category, []).append(not bool(wrong[b, at : at + length].any()))
            at += length
    return found


# -- training ---------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32, matrices of one shape together.

    torch.optim.Muon orthogonalises in bfloat16, which a CPU without bfloat16 units emulates: six times slower a step here.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for matrix in group["params"]:
                shapes.setdefault(tuple(matrix.shape), []).append(matrix)
            for shape, matrices in shapes.items():
                gradient = torch.stack([m.grad for m in matrices])
                momentum = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 0.05)
                x = gradient.lerp(momentum, 0.95)
                x = x.mT if shape[0] > shape[1] else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):  # Newton-Schulz
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if shape[0] > shape[1] else x
                for m, update in zip(matrices, x, strict=True):  # 0.2 sqrt(longer side): as large a step as AdamW takes
                    m.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                        update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5
                    )


class Course:
    """A stage of training: so many minutes, learning rates that warm up and fall as a cosine, a log by category."""

    def __init__(self, name: str, minutes: float, groups: list[tuple[str, list[nn.Parameter], float]]) -> None:
        """``groups``: ("muon" or "adamw", parameters, learning rate)."""
        self.name, self.minutes, self.log = name, minutes, list[dict[str, Any]]()
        self.weights = [p for _, parameters, _ in groups for p in parameters]
        self.optimizers: list[torch.optim.Optimizer] = []
        for kind, parameters, rate in groups:
            if kind == "muon":
                self.optimizers.append(Muon(parameters, rate, 0.01))
            else:
                self.optimizers.append(torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.0))
        self.rates = [rate for _, _, rate in groups]
        self.step, self.start, self.right = 0, time.time(), dict[str, list[bool]]()

    def __iter__(self) -> Iterator[int]:
        while (spent := (time.time() - self.start) / 60) < self.minutes:
            fall = max(0.02, 0.5 + 0.5 * math.cos(math.pi * spent / self.minutes))
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * min(1.0, (self.step + 1) / 50) * fall
            yield self.step

    def learn(self, loss: Tensor, right: dict[str, list[bool]]) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        for category, found in right.items():
            self.right.setdefault(category, []).extend(found)
        if self.step % 100 == 0:
            minutes = round((time.time() - self.start) / 60, 2)
            right_now = {k: round(sum(v) / len(v), 3) for k, v in sorted(self.right.items())}
            self.log.append({"step": self.step, "minutes": minutes, "loss": round(loss.item(), 4), "right": right_now})
            print(self.name, json.dumps(self.log[-1]), flush=True)
            self.right = {}


def shown(scene: scenes.Scene) -> tuple[Tensor, Tensor]:
    """The words of each patch, bool [196, V], and whether the patch is clearly one thing or another, bool [196].

    Colour and shape of the object a patch lies in, the word on the plate, the quadrant; "thing" inside an object, "things"
    at its centre, "word" on the plate. Patches at an object's edge are not clear.
    """
    words, clear = torch.zeros(196, len(IDS), dtype=torch.bool), torch.ones(196, dtype=torch.bool)
    place = torch.arange(14) * 16 + 8.0
    y, x = (part.flatten() for part in torch.meshgrid(place, place, indexing="ij"))
    for thing in scene.things:
        away = ((x - thing.x) ** 2 + (y - thing.y) ** 2).sqrt()
        inside = away < thing.radius + 3
        words[inside.nonzero(), torch.tensor([IDS[thing.colour], IDS[thing.shape], IDS["thing"]])] = True
        words[away.argmin(), IDS["things"]] = True
        clear &= inside | (away > thing.radius + 13)
    plate = ((x - scene.plate[0]).abs() < 26) & ((y - scene.plate[1]).abs() < 10)
    words[plate.nonzero(), torch.tensor([IDS[scene.word], IDS["word"]])] = True
    for name, where in (("top", y < 112), ("bottom", y > 112), ("left", x < 112), ("right", x > 112)):
        words[where, IDS[name]] = True
    return words, clear


def told(scene: scenes.Scene, rng: random.Random, count: int = 64) -> tuple[Tensor, Tensor]:
    """Words [count, V] and positions [count] of the patches of a scene worth telling, and of some of the background."""
    words, clear = shown(scene)
    busy = words[:, [IDS["thing"], IDS["word"]]].any(1)
    things, ground, edges = (part.nonzero()[:, 0].tolist() for part in (busy, ~busy & clear, ~busy & ~clear))
    things, ground = rng.sample(things, min(len(things), count - 8)), rng.sample(ground, len(ground))
    chosen = torch.tensor(sorted([*things, *ground, *edges][:count]))
    return words[chosen].float(), chosen


def spell(words: Tensor, position: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """The visual token that says these words at this place of the grid."""
    return words @ table + places[position // 14] + places[14 + position % 14]


def parts(decoder: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the layers, for Muon, and the rest: embeddings and norms."""
    matrices = [p for name, p in decoder.named_parameters() if "layers." in name and p.ndim == 2]
    known = {id(p) for p in matrices}
    return matrices, [p for p in decoder.parameters() if id(p) not in known]


def read(decoder: Any, run: Any, places: nn.Parameter, options: argparse.Namespace) -> list[dict[str, Any]]:
    """First stage: the decoder learns to answer about scenes that are told in words instead of pictures."""
    matrices, rest = parts(decoder)
    course = Course(
        "read", options.read_minutes, [("muon", matrices, options.rate), ("adamw", [*rest, places], options.rate / 2)]
    )
    rng, table = random.Random(1), decoder.embed_tokens.weight
    for step in course:
        chosen = [scenes.scene(TOLD + step * options.batch + i) for i in range(options.batch)]
        words, seen = (torch.stack(part) for part in zip(*(told(s, rng) for s in chosen), strict=True))
        batch = [s.questions(2) for s in chosen]
        visual = spell(words, seen, table, places)
        visual = visual + torch.randn_like(visual) * 0.05
        logits, labels = run(visual, seen, batch, 112)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        course.learn(loss, marks(logits, labels, batch))
    return course.log


class Pictures:
    """Cached features of the pictures that are trained on, in random order, again and again; every eighth of easy-VQA."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.scenes = np.load(options.folder / "f.npy", mmap_mode="r")[options.held :]
        self.easy = np.load(options.folder / "easy.npy", mmap_mode="r")
        self.about = [questions for _, questions in easy_vqa("train", EASY["train"])]
        self.there = int((options.folder / "f.done").read_text()) - options.held
        self.rng, self.epoch, self.order = random.Random(0), 0, list[int]()

    def take(self, count: int) -> tuple[Tensor, list[scenes.Scene]]:
        """Features of scenes, [count, 196, 768], and the scenes."""
        if len(self.order) < count:
            self.order = self.rng.sample(range(self.there), self.there)
            self.epoch += 1
        picked, self.order = self.order[:count], self.order[count:]
        return _rows(self.scenes, picked), [scenes.scene(i) for i in picked]

    def ask(self, count: int) -> tuple[Tensor, list[list[scenes.Question]]]:
        """Features [count, 196, 768] with questions."""
        found, chosen = self.take(count - count // 8)
        easy = self.rng.sample(range(len(self.about)), count // 8)
        asked = [s.questions(3, draw=self.epoch) for s in chosen]
        return torch.cat([found, _rows(self.easy, easy)]), asked + [
            self.rng.sample(self.about[i], min(8, len(self.about[i]))) for i in easy
        ]


def _rows(stored: Any, picked: list[int]) -> Tensor:
    return torch.from_numpy(stored[picked].astype(np.float32))


def whiten(projector: Any, sample: Tensor) -> None:
    """Fold the features' mean and deviation into the projector's first layer: CLIP has a few huge channels."""
    mean, deviation = sample.mean((0, 1)), sample.std((0, 1)).clamp_min(1e-3)
    first = projector.linear_1
    with torch.no_grad():
        nn.init.normal_(first.weight, std=sample.shape[-1] ** -0.5)
        first.weight /= deviation
        first.bias.copy_(-first.weight @ mean)


def align(
    projector: Any, table: Tensor, places: Tensor, pictures: Pictures, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Second stage: the projector learns to say of a patch what the decoder has learned to read."""
    whiten(projector, pictures.take(64)[0])
    first = projector.linear_1.weight  # of the size of 1 / deviation: steps that suit the rest are too large for it
    rest = [p for p in projector.parameters() if p is not first]
    course = Course("align", options.align_minutes, [("adamw", rest, 3e-3), ("adamw", [first], 5e-4)])
    for _ in course:
        found, chosen = pictures.take(16)
        words, clear = (torch.stack(part) for part in zip(*(shown(s) for s in chosen), strict=True))
        wanted = spell(words.float(), torch.arange(196), table, places)
        weight = 1 + 3 * words[..., [IDS["thing"], IDS["word"]]].any(-1).float()  # most patches are background
        error = (projector(found) - wanted).square().sum(-1) * weight
        spread = ((wanted - wanted.mean((0, 1))).square().sum(-1) * weight)[clear].mean()
        loss = error[clear].mean() / spread  # share of the variance that is not explained
        course.learn(loss, {})
    return course.log


def see(model: Any, run: Any, pictures: Pictures, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Third stage: projector and decoder learn to answer about pictures."""
    projector, decoder = model.model.multi_modal_projector, model.model.language_model
    matrices, words = parts(decoder)
    first = projector.linear_1.weight
    rest = [*words, *(p for p in projector.parameters() if p is not first)]
    course = Course(
        "see",
        options.minutes,
        [
            ("muon", matrices, options.rate / 2),
            ("adamw", rest, options.rate / 4),
            ("adamw", [first], options.rate / 10),
        ],
    )
    seen = torch.arange(small_llava.IMAGE_TOKENS).expand(options.batch, -1)
    for step in course:
        found, batch = pictures.ask(options.batch)
        logits, labels = run(projector(found), seen, batch, 164)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        course.learn(loss, marks(logits, labels, batch))
        if step % 500 == 499:
            save(model)
    return course.log


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = small_llava.blank()
    model.model.vision_tower = nn.Identity()
    projector, decoder = model.model.multi_modal_projector, model.model.language_model
    for matrix in parts(decoder)[0]:
        nn.init.normal_(matrix, std=0.05)
    width = decoder.embed_tokens.weight.shape[1]
    codes = nn.init.orthogonal_(torch.empty(width, len(IDS) + 28)).T  # a direction for each word, row and column
    with torch.no_grad():
        decoder.embed_tokens.weight.copy_(codes[: len(IDS)])
    places = nn.Parameter(codes[len(IDS) :].clone() * 0.7)
    model.train()
    if not options.eager:  # fuses what lies between the matrix products: several times faster on a CPU
        decoder.forward = torch.compile(decoder.forward, dynamic=False)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        return answers(decoder, *args)

    logs = {"read": read(decoder, run, places, options)}
    pictures = Pictures(options)
    logs["align"] = align(projector, decoder.embed_tokens.weight.detach(), places.detach(), pictures, options)
    logs["see"] = see(model, run, pictures, options)
    save(model)
    write_json(
        HERE / "small_llava_training.json",
        {
            "kind": "evidence/small_llava_training",
            "options": {k: str(v) for k, v in vars(options).items() if k not in ("run", "folder", "command")},
            "pictures": pictures.there,
            "epochs": pictures.epoch,
            "log": logs,
            "environment": environment("cpu"),
        },
    )


def save(model: nn.Module) -> None:
    state = {name: value.detach().half().contiguous() for name, value in small_llava.trained_state(model).items()}
    save_file(state, WEIGHTS)


def score(options: argparse.Namespace) -> None:
    """Held-out pictures; and the same questions with another picture: what the question alone gives away."""
    model = small_llava.load()
    held = [scenes.scene(scenes.HELD_OUT + i).questions() for i in range(options.held)]
    easy = [questions for _, questions in easy_vqa("test", EASY["test"])]
    sets = {
        "scenes": (held, np.load(options.folder / "f.npy", mmap_mode="r")[: options.held]),
        "easy-VQA": (easy, np.load(options.folder / "easy.npy", mmap_mode="r")[EASY["train"] :]),
    }
    for name, (asked, stored) in sets.items():
        for label, shift in (("", 0), (", another picture", 1)):
            by: dict[str, list[bool]] = {}
            for start in range(0, len(asked), 20):
                chosen = range(start, min(start + 20, len(asked)))
                batch = [asked[i] for i in chosen]
                seen = torch.arange(small_llava.IMAGE_TOKENS).expand(len(batch), -1)
                with torch.inference_mode():
                    visual = model.model.multi_modal_projector(
                        _rows(stored, [(i + shift) % len(asked) for i in chosen])
                    )
                    logits, labels = answers(model.model.language_model, visual, seen, batch, 260)
                for category, right in marks(logits, labels, batch).items():
                    by.setdefault(category, []).extend(right)
            everything = [x for values in by.values() for x in values]
            print(f"{name}{label}: {sum(everything) / len(everything):.3f} of {len(everything)}",
                  {k: round(sum(v) / len(v), 3) for k, v in sorted(by.items())})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("features", features), ("train", train), ("score", score)):
        sub = commands.add_parser(name)
        sub.set_defaults(run=run)
        sub.add_argument("--folder", type=Path, default=Path("evidence/cache"))
        sub.add_argument("--images", type=int, default=5888)
        sub.add_argument("--held", type=int, default=600)
        sub.add_argument("--read-minutes", type=float, default=10)
        sub.add_argument("--align-minutes", type=float, default=2)
        sub.add_argument("--minutes", type=float, default=36)
        sub.add_argument("--batch", type=int, default=16)
        sub.add_argument("--rate", type=float, default=3e-3)
        sub.add_argument("--eager", action="store_true", help="no torch.compile, which needs a C++ compiler")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
