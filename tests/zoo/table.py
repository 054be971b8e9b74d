"""The table of the zoo: what is expected of each model under each layout, where it is not the numbers of one process.

Keys are layouts, or families of them (``dp*``, ``pp*``, ``tp*``), or either with the name of the data after it.
"""

from tests.zoo.verdict import OTHER_OBJECTIVE, Row, as_ddp, as_microbatches, at_random, refused, told

# -- sentences by which a model is refused ---------------------------------------------------------------------------------------

UNFOLLOWED = refused("the sharded model computes a different first step from the unsharded model")
"""A value passes by a way that the mode does not follow, and the first-step check finds it."""
CUT_FAILS = refused("but the sharded model failed")
"""The same, where the user's code raises an error in the sharded model."""
BETWEEN_BLOCKS = refused("changes the hidden states")
OTHER_STAGE = refused("of another stage: the first stage holds modules")
SECOND_TENSOR = refused("is called with a second tensor that needs a gradient")
NO_ROLES = refused("tensor_parallel needs roles for the layers to shard")
NO_PLAN = refused("has no plan for tensor_parallel")
UNKNOWN_STYLE = refused("which this version does not support")
NOT_FOUND = refused("the stack of blocks was not found")
WRAPPED = refused("computes its weight or bias from other parameters")
BETWEEN = refused("failed after the first block and before the last one")
LEFT_OUT = refused("block was not called in this step")
IN_PLACE = refused("changes logits whose vocabulary is sharded")
WHOLE_MASK = refused("a mask must be made for the whole sequence")
MIXES = refused("mixes tokens and is no attention")
ITS_ATTENTION = refused("computes its attention itself")
NO_VOCABULARY = refused("no embedding or head has the role vocab_embedding or vocab_head")

# -- numbers that are not those of the whole batch -------------------------------------------------------------------------------

SAID = OTHER_OBJECTIVE


def no_mean(why: str) -> Row:
    return {"dp*": as_ddp(why), "ep": as_ddp(why), "pp*": as_microbatches(why, SAID)}


BALANCED = no_mean("how much a batch uses each expert")
"""The balancing loss of a mixture of experts, which reads the logits of all routers."""


TABLE: dict[str, Row] = {
    "gpt without roles": {"tp*": NO_ROLES},
    "alibi": {"tp*": UNFOLLOWED, "cp*": WHOLE_MASK},
    "rotary": {"cp*": UNFOLLOWED},
    "torch encoder without roles": {"tp*": NO_ROLES},
    "residual in mlp": {"tp*": CUT_FAILS, "tp_whole_tokens": UNFOLLOWED},
    # values on ways of their own
    "value residual": {"tp*": SECOND_TENSOR},
    "u-net, argument": {"tp": SECOND_TENSOR, "tp_vocab": SECOND_TENSOR},
    "u-net, concatenation": {"pp*": BETWEEN_BLOCKS},
    "first-to-last skip": {"pp": UNFOLLOWED, "pp_interleaved": UNFOLLOWED},
    "dense": {"pp*": BETWEEN_BLOCKS, "tp": BETWEEN, "tp_vocab": BETWEEN, "cp*": BETWEEN},
    "embedding to all blocks": {"pp*": BETWEEN_BLOCKS, "tp": BETWEEN, "tp_vocab": BETWEEN, "cp*": BETWEEN},
    "deep supervision 0.1": {"tp": LEFT_OUT, "tp_vocab": LEFT_OUT, "cp*": BETWEEN},
    "deep supervision 1e-4": {"tp": LEFT_OUT, "tp_vocab": LEFT_OUT, "cp*": BETWEEN},
    "in-place hidden states": {"pp*": CUT_FAILS},
    "collected states": {"tp": UNFOLLOWED, "tp_vocab": UNFOLLOWED, "cp*": UNFOLLOWED},
    "conditioned": {"tp": SECOND_TENSOR, "tp_vocab": SECOND_TENSOR},
    "third block with a norm over tokens": {"tp": UNFOLLOWED, "tp_vocab": UNFOLLOWED, "cp*": UNFOLLOWED},
    "third block with a glu": {"tp*": UNFOLLOWED},
    # auxiliary losses and sums over parameters
    "auxiliary loss on blocks": {"pp": UNFOLLOWED, "pp*": CUT_FAILS, "tp": UNFOLLOWED, "tp_vocab": UNFOLLOWED, "cp*": UNFOLLOWED},
    "auxiliary loss returned": {"tp": UNFOLLOWED, "tp_vocab": UNFOLLOWED, "cp*": UNFOLLOWED},
    "auxiliary loss or None": {"tp": UNFOLLOWED, "tp_vocab": UNFOLLOWED, "cp*": UNFOLLOWED},
    "auxiliary loss handed on": {"tp": SECOND_TENSOR, "tp_vocab": SECOND_TENSOR, "cp*": UNFOLLOWED},
    "auxiliary loss by hooks": {"pp*": UNFOLLOWED, "tp": UNFOLLOWED, "tp_vocab": UNFOLLOWED, "cp*": UNFOLLOWED},
    "L2": {"pp*": OTHER_STAGE, "tp*": UNFOLLOWED},
    "L2 of what is trained": {"pp*": UNFOLLOWED, "tp*": UNFOLLOWED},
    "L2 of the head": {"tp_vocab": UNFOLLOWED},
    # what a forward changes
    "counter in blocks": {"pp*": as_microbatches("a microbatch counts as a batch", "")},
    "running mean in blocks": {
        **no_mean("a mean over the batch, followed from batch to batch"),
        "tp": UNFOLLOWED,
        "tp_vocab": UNFOLLOWED,
        "cp*": UNFOLLOWED,
    },
    "running mean in the loss": {
        **no_mean("a mean over the batch"),
        "pp*": UNFOLLOWED,
        "tp": UNFOLLOWED,
        "tp_vocab": UNFOLLOWED,
        "cp*": UNFOLLOWED,
    },
    "state of the last batch": {"dp*": as_ddp("each rank keeps the state of its samples"), "pp*": UNFOLLOWED},
    "spectral_norm, old": {
        "pp*": as_microbatches("an iteration a forward", ""),
        "tp*": WRAPPED,
    },
    "spectral_norm": {"pp*": as_microbatches("an iteration a forward", ""), "tp*": WRAPPED},
    "orthogonal": {"tp*": WRAPPED},
    "weight_norm, old": {"tp*": WRAPPED},
    "weight_norm": {"tp*": WRAPPED},
    "batch norm before blocks": no_mean("statistics of the batch"),
    "batch norm in blocks": {**no_mean("statistics of the batch"), "cp*": MIXES},
    # around the blocks
    "norm registered before blocks": {"pp": OTHER_STAGE, "pp_interleaved": OTHER_STAGE},
    "logits in place": {"tp_vocab": IN_PLACE, "cp": refused("changes a tensor whose tokens are sharded")},
    # random numbers
    "dropout": {"*": at_random("masks")},
    "drop path": {"*": at_random("masks")},
    "layer drop in blocks": {"*": at_random("decisions"), "cp*": refused("without a call of F.scaled_dot_product_attention")},
    "layer drop in the loop": {
        "*": at_random("decisions"),
        "pp*": refused("Blocks that are left out at random"),
        "tp": LEFT_OUT,
        "tp_vocab": LEFT_OUT,
        "cp*": BETWEEN,
    },
    "noise on embeddings": {"*": at_random("noise")},
    # losses
    "sum loss": no_mean("a sum"),
    "median loss": no_mean("a median"),
    "max loss": no_mean("a maximum"),
    "root mean square": no_mean("a root of a mean"),
    "mean over a mask": no_mean("a mean over the tokens that count"),
    "ignored tokens": no_mean("a mean over the tokens that count"),
    "contrastive": no_mean("samples are compared with each other"),
    "llama, uneven": no_mean("a mean over the tokens that count"),
    # batches
    "batch with a table": {"pp*": told("a table as long as the batch is taken for a row a sample", SAID)},
    "batch as a list of samples": {"pp*": refused("may be a list with an item for each sample")},
    "time first": {"pp*": refused("samples seem to be along dim 1")},
    # Hugging Face
    **{name: {"tp*": NO_PLAN} for name in ("falcon", "dinov2", "wav2vec2")},
    **{name: {"tp*": NO_PLAN, "cp*": ITS_ATTENTION} for name in ("bloom", "mpt")},
    "gptj": {"cp*": ITS_ATTENTION},
    "opt": {"pp": OTHER_STAGE, "pp_interleaved": OTHER_STAGE},
    "mamba": {"tp*": NO_PLAN, "cp*": MIXES},
    "rwkv": {"tp*": NO_PLAN, "cp*": MIXES},
    "bert, plan": {"tp*": UNFOLLOWED, "tp_vocab": NO_VOCABULARY},
    "t5 encoder": {"tp*": NO_PLAN, "cp*": refused("learned position bias")},
    "t5": {"pp*": NOT_FOUND, "tp*": NO_PLAN, "cp*": NOT_FOUND},
    "bart": {"pp*": NOT_FOUND, "tp*": NO_PLAN, "cp*": NOT_FOUND},
    "vit": {"tp_vocab": NO_VOCABULARY},
    "gpt_oss, balanced": BALANCED,
    "llama4": {"tp*": UNKNOWN_STYLE, "ep": refused("has no plan for experts (base_model_ep_plan)")},
    **{f"{name}, balanced": BALANCED for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")},
    "mixtral, balanced, plan": BALANCED,
}
