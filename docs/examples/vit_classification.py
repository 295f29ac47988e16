"""Image classification with a ViT of transformers: adapters in the attention, and a classifier that trains in full."""

import torch
from transformers import ViTConfig, ViTForImageClassification

import fastlora


def base_model():
    """A small random model. Yours: ViTForImageClassification.from_pretrained("org/name", num_labels=2)"""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=2, **sizes))


def images_of_stripes(count, seed):
    """Noisy horizontal (class 0) and vertical (class 1) stripes. Yours: a DataLoader of images and labels"""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    phase = torch.randint(0, 8, (count, 1, 1), generator=random)
    wave = ((torch.arange(32) + phase) % 8 < 4).float() - 0.5  # (count, 1, 32)
    stripes = wave.expand(count, 32, 32).clone()
    stripes[labels == 0] = stripes[labels == 0].transpose(1, 2)
    noise = torch.randn(count, 3, 32, 32, generator=random)
    return stripes[:, None] + 0.3 * noise, labels


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()


images, labels = images_of_stripes(256, seed=1)
held_out = images_of_stripes(128, seed=2)

model = base_model().eval()
before = accuracy(model, *held_out)
# Without targets, the attention's projections are found by the model's structure.
parameters = fastlora.adapt(model, rank=8, modules_to_save=["classifier"])
optimizer = torch.optim.AdamW(parameters, lr=5e-3)
fastlora.print_trainable_parameters(model)

losses = []
model.train()
for step in range(80):
    batch = slice(step % 4 * 64, step % 4 * 64 + 64)
    loss = model(pixel_values=images[batch], labels=labels[batch]).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.eval()
after = accuracy(model, *held_out)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, held-out accuracy {before:.2f} -> {after:.2f}")
assert losses[-1] < losses[0] / 4 and after > 0.95

fastlora.save_adapter(model, "vit.safetensors")  # the adapters and the classifier
loaded = base_model().eval()
fastlora.adapt(loaded, rank=8, modules_to_save=["classifier"])
fastlora.load_adapter(loaded, "vit.safetensors")
with torch.no_grad():
    assert torch.equal(loaded(held_out[0]).logits, model(held_out[0]).logits)
