"""The mathematics of diversity-rewarded CFG distillation: pure functions, tensors in, tensors out.

Nothing here knows a model, a file or a trainer; every function can be read beside its equation.

| module | what it holds |
|---|---|
| `guidance` | classifier-free guided logits, with a scale per code if wanted |
| `codebooks` | the delay pattern: apply, revert, which cells are real |
| `divergence` | reverse and forward KL, generalised Jensen-Shannon: values and slopes |
| `distillation` | the whole loss, a chunk of the distributions at a time, with its analytic gradient |
| `diversity` | cosine distances in a group, the reward, its unbiased advantages and others', Vendi |
| `prefix_baseline` | a variance reducer for it, from embeddings of the beginnings of the clips |
| `interpolation` | weighted sums of tensors and of LoRA factors |
| `statistics` | bootstrap and jackknife by prompt, Fréchet, MMD, hypervolume, win rate |

Shape letters: P prompts, G generations per prompt, N = P·G rows (the G rows of a prompt adjacent),
K codebooks, T frames, S decoder steps, V codes per codebook, H hidden size, D embedding size.

Every function computes in float32, or in float64 when a float64 tensor is passed, whatever the model's
precision: guidance multiplies bfloat16's rounding by three.
"""
