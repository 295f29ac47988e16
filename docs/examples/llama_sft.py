"""Supervised fine-tuning of a causal language model of transformers, in a plain training loop."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora


def base_model():
    """A small random model. Yours: AutoModelForCausalLM.from_pretrained("org/name")"""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads))


def encode(text):
    """One token for each byte. Yours: tokenizer(text).input_ids"""
    return list(text.encode())


questions = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red"}
rows = []
for thing, colour in questions.items():
    prompt, answer = encode(f"What colour is {thing}? "), encode(f"{colour}.")
    rows.append((prompt + answer, [-100] * len(prompt) + answer))  # only answers count in the loss
length = max(len(tokens) for tokens, _ in rows)
tokens = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows])
labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in rows])
mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows])
batch = dict(input_ids=tokens, attention_mask=mask, labels=labels)

model = base_model()
parameters = fastlora.adapt(model, ["q_proj", "v_proj", "gate_proj", "up_proj"], rank=8, alpha=16)
optimizer = torch.optim.AdamW(parameters, lr=1e-2)
fastlora.print_trainable_parameters(model)

losses = []
for _ in range(60):
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 4

# A folder that PEFT and transformers load too. fastlora loads it into the plain model:
model.eval()
fastlora.save_pretrained(model, "llama_adapter", task_type="CAUSAL_LM")
loaded = base_model().eval()
fastlora.from_pretrained(loaded, "llama_adapter")
with torch.no_grad():
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    prompt = torch.tensor([encode("What colour is grass? ")])
    reply = loaded.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )
    print(bytes(reply[0].tolist()).decode(errors="replace"))
