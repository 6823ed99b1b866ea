"""Low-rank adapters side by side with full fine-tuning: time and memory of a training step, and of inference after it.

    python benchmarks/adaptation.py                # about two minutes on one core
    python benchmarks/adaptation.py --depth 4      # a third of the transformer's blocks: about one minute
    python benchmarks/adaptation.py --batch 32     # on an accelerator, which is taken if there is one

The ViT-B/16 at 224 px has random weights and the layout of BiomedCLIP's image tower. Training is in float32, as in
`adapt_lora`. "Saved" is what autograd keeps for the backward pass beyond the weights; "state" are the gradients and
AdamW's two moments. Both follow from the shapes; what other devices' kernels save may differ a little.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import medrobust_lib as mr  # first: it lets torchvision import beside a CPU-only torch

# isort: split
import open_clip
import pandas as pd
import torch
import typer
from open_clip import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn import functional

from medrobust_lib.adaptation.adapting import summed_convolutions
from medrobust_lib.models.adapters import adapter_layout, adapter_parameters, attach_adapters, merge_adapters
from medrobust_lib.models.dual_encoder import DualEncoder, find_image_tower
from medrobust_lib.models.loading import resolve_device
from medrobust_lib.models.open_clip import OpenClipEncoder

MB = 1e6


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or the name of an accelerator.")] = "auto",
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    depth: Annotated[int, typer.Option(min=1, max=12, help="Blocks of the transformer.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Images of 224 px in a step; eight times as many of 64 px.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; medians are printed.")] = 3,
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 1,
) -> None:
    """Time all variants in turn and print them beside each other."""
    torch.set_num_threads(threads)
    target = resolve_device(device)
    typer.echo(f"{target}, {threads} thread(s), torch {torch.__version__}, rank {rank}\n")
    demo = mr.load_model("demo-clip", device=target, dtype="float32")
    transformer = vit_b16(depth).to(target)
    for title, model, count in (
        (f"demo-clip, 64 px, {8 * batch} images a step", demo, 8 * batch),
        (f"ViT-B/16, {depth} of 12 blocks, 224 px, {batch} images a step", transformer, batch),
    ):
        pixels = torch.rand(count, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
        typer.echo(f"{title}\n{shown(training(model, pixels.to(target), rank, repeats))}\n")
        typer.echo(f"{shown(inference(model, pixels.to(target), rank, repeats))}\n")


def vit_b16(depth: int) -> DualEncoder:
    """BiomedCLIP's image tower with random weights beside a text tower of one layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(
            embed_dim=512,
            vision_cfg=CLIPVisionCfg(
                timm_model_name="vit_base_patch16_224", timm_pool="", timm_proj="linear", image_size=224
            ),
            text_cfg=CLIPTextCfg(context_length=16, width=64, heads=1, layers=1),
        )
    network.visual.trunk.blocks = network.visual.trunk.blocks[:depth]
    network.visual.preprocess_cfg = {"size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    model = OpenClipEncoder(network, tokenizer, id="random ViT-B/16", provenance={})
    return model.eval().requires_grad_(False)


def training(model: DualEncoder, pixels: Tensor, rank: int, repeats: int) -> pd.DataFrame:
    """One step of AdamW: all weights, adapters as `adapt_lora` trains them, and adapters as peft computes them."""
    tuned, ours, pefts = copy.deepcopy(model), attach_adapters(model, rank=rank), attach_adapters(model, rank=rank)
    towers = {
        "full fine-tuning": (tuned, find_image_tower(tuned).parameters),
        "adapters": (ours, adapter_parameters(ours)),
    }
    if adapter_layout(model).kind == "convolutions":
        towers["adapters, three convolutions each (peft)"] = (pefts, adapter_parameters(pefts))
    steps, rows, gradients = {}, [], {}
    with summed_convolutions(ours):
        for what, (tower, parameters) in towers.items():
            steps[what] = step_of(tower, parameters, pixels)
            with counted() as saved:
                steps[what](update=False)
            gradients[what] = {name: parameter.grad.clone() for name, parameter in parameters.items()}
            numbers = sum(parameter.numel() for parameter in parameters.values())
            same = difference(gradients[what], gradients["adapters"]) if tower is pefts else None
            rows.append(
                {
                    "training step": what,
                    "trained numbers": f"{numbers:,}",
                    "state MB": 3 * 4 * numbers / MB,
                    "saved MB/image": sum(saved.values()) / MB / len(pixels),
                    "largest difference": same,
                }
            )
        seconds = in_turn(steps, repeats)
    table = pd.DataFrame(rows).astype({"largest difference": float})
    table["s/image"] = [seconds[what] / len(pixels) for what in towers]
    ratios = {"time / full": "s/image", "saved / full": "saved MB/image", "state / full": "state MB"}
    return table.assign(**{ratio: table[column] / table[column].iloc[0] for ratio, column in ratios.items()})


def step_of(model: DualEncoder, parameters: Mapping[str, nn.Parameter], pixels: Tensor) -> Callable[..., None]:
    """Function that takes one training step; ``update=False`` leaves the weights as they are."""
    generator = torch.Generator().manual_seed(0)
    texts = functional.normalize(torch.randn(8, model.embed_dim, generator=generator), dim=1).to(pixels.device)
    targets = (torch.arange(len(pixels)) % 8).to(pixels.device)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-5)

    def step(*, update: bool = True) -> None:
        optimiser.zero_grad()
        logits = model.logit_scale * model.encode_image(pixels) @ texts.T
        functional.cross_entropy(logits, targets).backward()
        if update:
            optimiser.step()

    return step


def inference(model: DualEncoder, pixels: Tensor, rank: int, repeats: int) -> pd.DataFrame:
    """Image features of the model itself, with adapters beside the weights, and with merged ones."""
    apart = attach_adapters(model, rank=rank)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(apart).values():  # products that are not zero
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    apart = apart.requires_grad_(False)
    towers = {"model": model, "adapters apart": apart, "adapters merged": merge_adapters(apart)}

    def encode(tower: DualEncoder) -> Callable[[], Tensor]:
        return torch.inference_mode()(lambda: tower.encode_image(pixels))

    features = {what: encode(tower)() for what, tower in towers.items()}
    seconds = in_turn({what: encode(tower) for what, tower in towers.items()}, repeats)
    error = float((features["adapters merged"] - features["adapters apart"]).abs().max())
    return pd.DataFrame(
        [
            {
                "inference": what,
                "s/image": seconds[what] / len(pixels),
                "time / model": seconds[what] / seconds["model"],
                "largest difference": error if what == "adapters merged" else None,
            }
            for what in towers
        ]
    )


def in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn after one round to warm up."""
    seconds: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(repeats + 1):
        for what, run in runs.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            if turn:
                seconds[what].append(time.perf_counter() - started)
    return {what: statistics.median(values) for what, values in seconds.items()}


def wait() -> None:
    """An accelerator works on its own; its time counts only when it is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def counted() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves meanwhile, by address; parameters do not count."""
    saved: dict[int, int] = {}
    kept = []  # an address is another storage's as soon as its own is freed

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    kept.clear()


def difference(found: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to the largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in others.values())
    return max(float((found[name] - others[name]).abs().max()) for name in others) / largest


def shown(table: pd.DataFrame) -> str:
    """Table as text."""
    return table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.3g}")


if __name__ == "__main__":
    typer.run(main)
