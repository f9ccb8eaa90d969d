import os, json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from safetensors.torch import save_file
torch.set_num_threads(1)
out = sys.argv[1]
for name, tie in [("untied", False), ("tied", True)]:
    torch.manual_seed(7)
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=tie, attention_bias=tie, initializer_range=0.3, max_position_embeddings=128, rope_theta=5000.0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'norm' in n or n.endswith('bias'): p.normal_(1.0 if 'norm' in n else 0.0, 0.3)
    tokens = torch.randint(0, 31, (2, 21))
    with torch.no_grad(): logits = model(tokens).logits
    model.save_pretrained(f"{out}/{name}")
    save_file({"tokens": tokens, "logits": logits.float().contiguous()}, f"{out}/{name}/expected.safetensors")
    print(name, logits.abs().mean(), os.listdir(f"{out}/{name}"))
    print(open(f"{out}/{name}/config.json").read())
