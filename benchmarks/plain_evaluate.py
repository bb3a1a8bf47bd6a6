"""The plain script that people write to score a checkpoint; the baseline of `evaluate`.

    python plain_evaluate.py IMAGES CHECKPOINT SIDE FEATURES

It loads the checkpoint into torchvision's network, reads both splits by ImageFolder with Resize, CenterCrop and Normalize on
8-bit images, passes them forward in batches of 64, and takes the nearest of 1 and 20 by a product and `topk`. FEATURES is the
file that takes the features of both splits, so that they can be compared.
"""

import sys

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

root, checkpoint, side, out = sys.argv[1:]
torch.set_num_threads(1)
net = models.resnet18()
net.load_state_dict(torch.load(checkpoint, weights_only=True))
net.fc = nn.Identity()
net.eval()
steps = [transforms.Resize(round(int(side) / 0.875)), transforms.CenterCrop(int(side)), transforms.ToTensor()]
view = transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
found, labels = {}, {}
for split in ("train", "val"):
    batches: DataLoader[torch.Tensor] = DataLoader(datasets.ImageFolder(f"{root}/{split}", view), 64)
    with torch.inference_mode():
        parts = [(net(images), label) for images, label in batches]
    found[split], labels[split] = (torch.cat(each) for each in zip(*parts, strict=True))
query, bank = (functional.normalize(found[split], dim=1) for split in ("val", "train"))
near = (query @ bank.T).topk(min(20, len(bank)), dim=1).indices
for k in (1, 20):
    right = labels["train"][near[:, :k]].mode(dim=1).values == labels["val"]
    print(f"{k}-NN {100 * right.float().mean():.2f}")  # noqa: T201 - a script
torch.save(found, out)
