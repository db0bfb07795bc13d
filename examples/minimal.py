"""LeJEPA in one file: a stock DataLoader, a stock encoder, and the loss of lejepa_fast.

    pip install '.[train]'                  # in a clone of the repository
    python examples/minimal.py              # two minutes on two CPU cores

Random views of an image go through an encoder and a projector. The loss pulls the views of an image together
(prediction) and keeps the embeddings of all images an isotropic Gaussian (SIGReg), which prevents a collapse.
There is no teacher, no stop-gradient, no negative pair. Labels only measure what the encoder has learned, by
nearest neighbors before and after. Paper: https://arxiv.org/abs/2511.08544
"""

import argparse
import itertools
import time
from typing import Literal

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lejepa_fast import LeJEPALoss, SIGReg
from lejepa_fast.data import open_source

GLOBAL_SIZE, LOCAL_SIZE = 48, 32  # pixels
TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)]


def random_view(size: int, scale: tuple[float, float]) -> v2.Compose:
    """A crop of `scale` (share of the image's area) at `size` pixels, with random flip and colors."""
    crop = v2.RandomResizedCrop(size, scale)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.2, 0.1), *TO_TENSOR])


class Views(Dataset):
    """Two global views (2, 3, 48, 48) and two local views (2, 3, 32, 32) of every image."""

    def __init__(self, images: list[Image.Image]):
        self.images = images
        self.global_view = random_view(GLOBAL_SIZE, (0.4, 1.0))
        self.local_view = random_view(LOCAL_SIZE, (0.1, 0.4))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        global_views = [self.global_view(image), self.global_view(image)]
        return torch.stack(global_views), torch.stack([self.local_view(image), self.local_view(image)])


def load(split: Literal["train", "val"]) -> tuple[list[Image.Image], Tensor]:
    """Images and labels (N,) of the embedded TrashNet photos: six kinds of litter, 96 px."""
    source = open_source("trashnet96", split)
    pairs = [source[i] for i in range(len(source))]
    return [image for image, _ in pairs], torch.tensor([label for _, label in pairs])


def embed(model: nn.Module, views: Tensor) -> Tensor:
    """Views (N, V, 3, size, size) -> embeddings (V, N, 64)."""
    return model(views.flatten(0, 1)).unflatten(0, views.shape[:2]).transpose(0, 1)


@torch.no_grad()
def knn_accuracy(encoder: nn.Module, train: tuple, test: tuple, k: int = 10) -> float:
    """Accuracy of the most frequent label among the k training images whose features are most similar."""
    encoder.eval()
    whole = v2.Compose([v2.Resize(GLOBAL_SIZE), v2.CenterCrop(GLOBAL_SIZE), *TO_TENSOR])

    def features(images: list[Image.Image]) -> Tensor:
        parts = [encoder(batch) for batch in torch.stack([whole(image) for image in images]).split(256)]
        return nn.functional.normalize(torch.cat(parts), dim=1)

    (train_images, train_labels), (test_images, test_labels) = train, test
    nearest = (features(test_images) @ features(train_images).T).topk(k).indices
    predicted = train_labels[nearest].mode(dim=1).values
    encoder.train()
    return (predicted == test_labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="LeJEPA on the embedded TrashNet photos.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    train, test = load("train"), load("val")

    encoder = timm.create_model("resnet18", num_classes=0, channels=[32, 64, 128, 256], layers=[1, 1, 1, 1])
    projector = nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512), nn.GELU(), nn.Linear(512, 64))
    model = nn.Sequential(encoder, projector)
    loss_fn = LeJEPALoss(lambd=0.1, sigreg=SIGReg(num_slices=256))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=args.steps)
    loader = DataLoader(Views(train[0]), args.batch, shuffle=True, drop_last=True, num_workers=1)

    print(f"kNN accuracy before: {knn_accuracy(encoder, train, test):.3f}")
    start = time.perf_counter()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    for step, (global_views, local_views) in enumerate(itertools.islice(batches, args.steps)):
        # z (4, N, 64): one call of the model for each size, global views first.
        z = torch.cat([embed(model, views) for views in (global_views, local_views)])
        loss = loss_fn(z[: global_views.shape[1]], z)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == args.steps - 1:
            parts = f"total {loss.total:.3f}  prediction {loss.prediction:.3f}  SIGReg {loss.sigreg:.3f}"
            print(f"step {step:4}  {parts}  {time.perf_counter() - start:.0f} s", flush=True)
    print(f"kNN accuracy after: {knn_accuracy(encoder, train, test):.3f}")


if __name__ == "__main__":
    main()
