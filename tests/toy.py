"""Another family: a recurrent language model over twelve letters, one codebook, no delay, a null prompt of its own.

Nothing in the package knows it. It is what CONTRIBUTING promises a new family costs.
"""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from diverse_cfg.policies.families import Family, register
from diverse_cfg.policies.layers import effective_weight
from diverse_cfg.policies.policy import Policy, require_prompts
from diverse_cfg.types import TextCondition

WORDS = ["red", "green", "blue", "big", "small", "round"]


class ToyConfig(PreTrainedConfig):
    model_type = "toy-letters"

    def __init__(self, vocab_size: int = 12, hidden_size: int = 16, num_words: int = 8, **kwargs) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_words = vocab_size, hidden_size, num_words


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "codes"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(
            config.num_words, config.hidden_size
        )  # the text encoder, which stays as it is
        self.no_words = nn.Embedding(1, config.hidden_size)  # the null prompt, learnt as a word of its own
        self.letters = nn.Embedding(config.vocab_size + 1, config.hidden_size)  # the last one is the start
        self.rnn = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Transformers' own would make everything flat."""

    def forward(self, codes: Tensor, text: Tensor) -> Tensor:
        """Hidden states [N, T, D] of codes [N, T], under a text [N, D]."""
        start = torch.full_like(codes[:, :1], self.config.vocab_size)
        before = torch.cat([start, codes[:, :-1]], dim=1)
        return self.rnn(self.letters(before) + text[:, None])[0]


class ToyPolicy(Policy):
    trained = ("letters.", "rnn.", "head.")
    shared = ("words", "no_words")
    lora_targets = ("head",)

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def max_steps(self) -> int:
        return 64

    def encode_text(self, prompts) -> TextCondition:
        require_prompts(prompts, self.tokenizer)
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.device)
        with torch.no_grad():
            return TextCondition(self.model.words(tokens.input_ids), tokens.attention_mask)

    def null(self, condition: TextCondition) -> TextCondition:
        nothing = self.model.no_words.weight.detach().expand_as(condition.hidden_states)
        mask = torch.zeros_like(condition.attention_mask)
        mask[:, 0] = 1
        return TextCondition(nothing, mask)

    def hidden_states(self, codes: Tensor, condition: TextCondition | None) -> Tensor:
        if condition is None:
            text = self.model.no_words.weight.expand(len(codes), -1)
        else:
            mask = condition.attention_mask[..., None]
            text = (condition.hidden_states * mask).sum(dim=1) / mask.sum(dim=1)
        return self.model(codes[:, 0], text)

    def head_weights(self) -> Tensor:
        return effective_weight(self.model.head)[None]


class Toy(Family):
    model_type = ToyConfig.model_type
    model_class = ToyModel
    policy_class = ToyPolicy


register(Toy())


def toy_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>"
    )


def toy_folder(folder) -> str:
    """A base with random weights, whose text and letters matter."""
    torch.manual_seed(0)
    model = ToyModel(ToyConfig())
    model.head.weight.data.mul_(4)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)
