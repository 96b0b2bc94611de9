"""The published networks once more, in float64, written from their description and not from the product's code."""

from __future__ import annotations

import math

import torch

State = dict[str, torch.Tensor]


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * (0.5 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }


def backbone_shapes(hidden: int, seq_len: int, num_blocks: int, tokens: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    num_tokens, width = tokens
    shapes: dict[str, tuple[int, ...]] = {
        "backbone_linear.weight": (num_tokens * width, hidden * seq_len),
        "backbone_linear.bias": (num_tokens * width,),
    }
    for kind, size in ((1, hidden), (2, seq_len)):
        for block in range(num_blocks):
            for part, is_matrix in (("0", False), ("1.0", True), ("1.3", True)):
                name = f"mixer_blocks{kind}.{block}.{part}"
                shapes[f"{name}.weight"] = (size, size) if is_matrix else (size,)
                shapes[f"{name}.bias"] = (size,)
    for index in (0, 2, 3, 5, 6, 8):
        shapes[f"clip_proj.{index}.weight"] = (width, width) if index in (2, 5, 8) else (width,)
        shapes[f"clip_proj.{index}.bias"] = (width,)
    return shapes


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mixer_block(x: torch.Tensor, w: State, name: str) -> torch.Tensor:
    x = layer_norm(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])
    x = gelu(x @ w[f"{name}.1.0.weight"].T + w[f"{name}.1.0.bias"])
    return x @ w[f"{name}.1.3.weight"].T + w[f"{name}.1.3.bias"]


def published_mixer(x_BSH: torch.Tensor, w: State, num_blocks: int) -> torch.Tensor:
    x, r1, r2 = x_BSH, x_BSH, x_BSH.transpose(1, 2)
    for block in range(num_blocks):
        x = mixer_block(x, w, f"mixer_blocks1.{block}") + r1
        r1 = x
        y = mixer_block(x.transpose(1, 2), w, f"mixer_blocks2.{block}") + r2
        r2 = y
        x = y.transpose(1, 2)
    return x


def repaired_mixer(x_BSH: torch.Tensor, w: State, num_blocks: int) -> torch.Tensor:
    x = x_BSH
    for block in range(num_blocks):
        x = x + mixer_block(x, w, f"mixer_blocks1.{block}")
        x = x + mixer_block(x.transpose(1, 2), w, f"mixer_blocks2.{block}").transpose(1, 2)
    return x


def published_head(
    x_BSH: torch.Tensor, w: State, num_blocks: int, tokens: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    flat = published_mixer(x_BSH, w, num_blocks).flatten(1)
    backbone = (flat @ w["backbone_linear.weight"].T + w["backbone_linear.bias"]).reshape(-1, *tokens)
    x = backbone
    for norm, linear in ((0, 2), (3, 5), (6, 8)):
        x = gelu(layer_norm(x, w[f"clip_proj.{norm}.weight"], w[f"clip_proj.{norm}.bias"]))
        x = x @ w[f"clip_proj.{linear}.weight"].T + w[f"clip_proj.{linear}.bias"]
    return backbone, x


def scale_norm(x: torch.Tensor, scale: torch.Tensor, is_stable: bool = False) -> torch.Tensor:
    if is_stable:
        x = x / x.amax(-1, keepdim=True)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def bucket(query: int, key: int) -> int:
    distance = max(0, query - key)
    if distance < 16:
        return distance
    return min(31, 16 + int(16 * math.log(distance / 16) / math.log(8)))


def rotated(vector: torch.Tensor, position: int) -> torch.Tensor:
    """One head's vector at one position: interleaved pairs of its first 32 columns turned."""
    out, dim = vector.clone(), min(32, len(vector))
    for pair in range(dim // 2):
        angle = position / 10000 ** (2 * pair / dim)
        a, b = vector[2 * pair], vector[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def prior_output(
    noisy_LD: torch.Tensor, time: int, condition_LD: torch.Tensor, w: State, depth: int, heads: int, dim_head: int
) -> torch.Tensor:
    """The prior's network on one sample, position by position and head by head."""
    width = noisy_LD.shape[1]
    steps = torch.arange(width // 2, dtype=torch.float64)
    angles = time * torch.exp(-math.log(1e4) * steps / (width // 2 - 1))
    t = torch.cat([angles.sin(), angles.cos()])
    for i in (0, 2, 4):
        t = t @ w[f"time.{i}.weight"].T + w[f"time.{i}.bias"]
        t = t * torch.sigmoid(t) if i < 4 else t
    x = torch.cat([condition_LD, t[None], noisy_LD + w["learned_query"]])
    for layer in range(depth):
        x = x + _attention(x, w, f"layers.{layer}.attention", heads, dim_head)
        name = f"layers.{layer}.feedforward"
        u, gate = (scale_norm(x, w[f"{name}.norm.scale"]) @ w[f"{name}.linear_in.weight"].T).chunk(2, -1)
        x = x + (u * gate * torch.sigmoid(gate)) @ w[f"{name}.linear_out.weight"].T
    out = scale_norm(x, w["norm.scale"], is_stable=True) @ w["project_out.weight"].T
    return out[-len(noisy_LD) :]


def _attention(x: torch.Tensor, w: State, name: str, heads: int, dim_head: int) -> torch.Tensor:
    y, table = scale_norm(x, w[f"{name}.norm.scale"]), w["relative_attention_bias.weight"]
    q, kv = y @ w[f"{name}.to_q.weight"].T, y @ w[f"{name}.to_kv.weight"].T
    keys = [w[f"{name}.null_kv"][0], *(rotated(kv[j, :dim_head], j) for j in range(len(x)))]
    values = torch.stack([w[f"{name}.null_kv"][1], *kv[:, dim_head:]])
    keys_ME = torch.stack([key / key.norm() for key in keys])
    rows = []
    for i in range(len(x)):
        mixed = []
        for head in range(heads):
            query = rotated(q[i, head * dim_head : (head + 1) * dim_head], i)
            bias = torch.stack([table[bucket(i, j), head] for j in range(len(keys))])
            weights = (16 * keys_ME @ (query / query.norm()) + bias).softmax(0)
            mixed.append(weights @ values)
        rows.append(torch.cat(mixed))
    return scale_norm(torch.stack(rows) @ w[f"{name}.to_out.weight"].T, w[f"{name}.out_norm.scale"])
