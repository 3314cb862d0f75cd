"""The only folder that knows MusicGen: `policy` (text in, logits over codes out), `rollout` (clips out)."""
