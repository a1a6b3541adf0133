"""Pictures as bytes, and prompts with videos."""

import base64
import binascii
import struct

import torch

from saint.upstream.tiny import END, START
from support.families import VIDEO


def png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> str:
    """A PNG with this header, whatever its data are."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", binascii.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", data), (b"IEND", b"")]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)).decode()


def saved(folder, pictures):
    """A new folder with PIL images in it: 0.png, 1.png and so on."""
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    return folder


def movie(name, clips, seed=0, still=0.5):
    """A prompt with videos: keyword inputs. ``still``: share of the groups of patches that a frame has of the frame before.

    ``clips``: frames, rows and columns of patches of each (LLaVA-OneVision: 6 x 6, always).
    """
    g = torch.Generator().manual_seed(seed)
    ids = [5, 6]
    if name == "llava-onevision":
        pixels = []
        for count, _, _ in clips:
            shown = [torch.randn(3, 24, 24, generator=g)]
            for _ in range(count - 1):
                new = torch.rand(3, 3, generator=g) >= still
                new = new.repeat_interleave(8, 0).repeat_interleave(8, 1)
                shown.append(torch.where(new, torch.randn(3, 24, 24, generator=g), shown[-1]))
            pixels.append(torch.stack(shown))
            ids += [VIDEO] * (9 * count + 1) + [7]
        return {"pixel_values_videos": torch.stack(pixels), "input_ids": torch.tensor([[*ids, 8]])}
    pixels = []
    for count, rows, columns in clips:
        shown = [torch.randn(rows * columns // 4, 4, 96, generator=g)]
        for _ in range(count - 1):
            new = torch.rand(len(shown[0]), 1, 1, generator=g) >= still
            shown.append(torch.where(new, torch.randn(shown[0].shape, generator=g), shown[-1]))
        pixels += [frame.flatten(0, 1) for frame in shown]
        places = [VIDEO] * len(shown[0])
        # Qwen3-VL places each frame on its own, behind a time stamp
        ids += [9, START, *places, END] * count if name == "qwen3-vl" else [START, *places * count, END]
        ids += [7]
    ids = torch.tensor([[*ids, 8]])
    return {
        "pixel_values_videos": torch.cat(pixels),
        "video_grid_thw": torch.tensor(clips),
        "input_ids": ids,
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
    }
