"""LoRA of a U-Net of diffusers with the usual loss on the predicted noise, saved in a file that diffusers loads."""

import subprocess
import sys

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

import fastlora


def base_model():
    """A small random model. Yours: UNet2DConditionModel.from_pretrained("org/name", subfolder="unet")"""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
    )


# Bright squares on dark ground, and one prompt. Yours: the VAE's latents and the text encoder's states
latents = torch.full((16, 4, 16, 16), -1.0)
for n in range(16):
    latents[n, :, n % 4 + 2 : n % 4 + 10, n // 4 + 2 : n // 4 + 10] = 1.0
prompt = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))

scheduler = DDPMScheduler()
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
timesteps = torch.arange(16) * 60 + 20


def noise_loss(model, noise, timesteps):
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = model(noisy, timesteps, prompt.expand(len(latents), -1, -1)).sample
    return F.mse_loss(predicted, noise)


model = base_model()
targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out"]
config = fastlora.LoRAConfig(targets, rank=8, alpha=16, kinds=("linear", "conv"))
parameters = fastlora.adapt(model, config)
optimizer = torch.optim.AdamW(parameters, lr=1e-2)
fastlora.print_trainable_parameters(model)

with torch.no_grad():
    before = noise_loss(model, noise, timesteps).item()
random = torch.Generator().manual_seed(3)
for _ in range(20):
    steps = torch.randint(0, 1000, (len(latents),), generator=random)
    loss = noise_loss(model, torch.randn(latents.shape, generator=random), steps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    after = noise_loss(model, noise, timesteps).item()  # noise that training did not see
print(f"loss {before:.3f} -> {after:.3f}")
assert after < 0.7 * before

fastlora.save_adapter(model, "unet.safetensors")
target = "pytorch_lora_weights.safetensors"
convert = ["convert", "unet.safetensors", target, "--to", "diffusers"]
subprocess.run([sys.executable, "-m", "fastlora", *convert], check=True)

in_diffusers = base_model()
in_diffusers.load_lora_adapter(target, prefix=None, use_safetensors=True)  # needs PEFT
with torch.no_grad():
    loaded = noise_loss(in_diffusers, noise, timesteps).item()
assert abs(loaded - after) < 1e-4 * after
