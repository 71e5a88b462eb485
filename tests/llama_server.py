"""A real llama.cpp server with a model that says what a test wants.

    python3 tests/llama_server.py DIRECTORY

llama.cpp comes as the PyPI package `xllamacpp`, whose wheel holds its server.  The
model is made here with `gguf`: its one layer adds nothing, so that each token leads to
one other, and the chat template chooses where the chain begins.
"""

from __future__ import annotations

import os
import signal
import sys

CALL = '<tool_call>\n{"name": "exec", "arguments": {"command": "%s", "node": "%s"}}\n'
CALL += "</tool_call>\n"
CHAINS = {  # the token that ends the prompt, and what the model says then
    "<|call|>": "I look.\n"
    + "".join(CALL % ("echo on $NODE", node) for node in ("alpha", "beta")),
    "<|answer|>": "Both are there.",
    "<|endless|>": None,  # the same token for ever
}
# Tools and the system's text are left out: each of their bytes would be a token.
TEMPLATE = """
{%- for message in messages if message.role != 'system' -%}
<|{{ message.role }}|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{%- set args = call.function.arguments %}
{"name": "{{ call.function.name }}", "arguments": {{ args | tojson }}}
</tool_call>
{% endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}
{%- if 'count' in (messages[-1].content or '') %}<|endless|>
{%- elif tools and messages[-1].role == 'user' %}<|call|>
{%- else %}<|answer|>{% endif %}
{%- endif %}"""
UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1  # kinds of tokens
END = 2  # the token that ends an answer


def pieces_of(text, taken):
    """Return `text` in pieces that are different tokens, so that none leads to two."""
    pieces, at = [], 0
    while at < len(text):
        sizes = range(3, len(text) - at + 1)
        free = (n for n in sizes if text[at : at + n] not in taken)
        size = next(free, len(text) - at)
        piece = text[at : at + size]
        if piece in taken or len(piece) < 3:  # what is left at the end
            piece = pieces.pop() + piece
        taken.add(piece)
        pieces.append(piece)
        at += size
    return pieces


def write_model(path):
    import gguf
    import numpy

    tokens = ["<unk>", "<s>", "<|end|>", *CHAINS]
    tokens += [f"<|{role}|>" for role in ("system", "user", "assistant", "tool")]
    kinds = [UNKNOWN] + [CONTROL] * (len(tokens) - 1)
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    kinds += [BYTE] * 256
    leads_to, taken = {}, set(tokens)
    for start, text in CHAINS.items():
        last = tokens.index(start)
        for piece in pieces_of((text or "again ").replace(" ", "\u2581"), taken):
            tokens.append(piece)
            kinds.append(NORMAL)
            leads_to[last] = last = len(tokens) - 1
        leads_to[last] = END if text else last
    width = -(-len(tokens) // 64) * 64

    model = gguf.GGUFWriter(path, "llama")
    model.add_context_length(65536)
    model.add_embedding_length(width)
    model.add_block_count(1)
    model.add_feed_forward_length(32)
    model.add_head_count(1)
    model.add_head_count_kv(1)
    model.add_key_length(32)
    model.add_value_length(32)
    model.add_rope_dimension_count(32)
    model.add_layer_norm_rms_eps(1e-5)
    model.add_vocab_size(len(tokens))
    model.add_tokenizer_model("llama")
    model.add_token_list([token.encode() for token in tokens])
    # Prompts are cut into bytes: no piece is worth joining.
    model.add_token_scores([-1000.0 if kind == NORMAL else 0.0 for kind in kinds])
    model.add_token_types(kinds)
    model.add_unk_token_id(0)
    model.add_bos_token_id(1)
    model.add_eos_token_id(END)
    model.add_add_space_prefix(False)
    model.add_chat_template(TEMPLATE)

    def zeros(*shape):
        return numpy.zeros(shape, numpy.float32)

    embedding, output = zeros(len(tokens), width), zeros(len(tokens), width)
    for token in range(len(tokens)):
        embedding[token, token] = 1
        output[leads_to.get(token, END), token] = 5
    ones = numpy.ones(width, numpy.float32)
    tensors = {
        "token_embd": embedding.astype(numpy.float16),
        "output": output.astype(numpy.float16),
        "output_norm": ones,
        "blk.0.attn_norm": ones,
        "blk.0.ffn_norm": ones,
        "blk.0.ffn_gate": zeros(32, width),
        "blk.0.ffn_up": zeros(32, width),
        "blk.0.ffn_down": zeros(width, 32),
    }
    for name in ("attn_q", "attn_k", "attn_v"):
        tensors[f"blk.0.{name}"] = zeros(32, width)
    tensors["blk.0.attn_output"] = zeros(width, 32)
    for name, tensor in tensors.items():
        model.add_tensor(f"{name}.weight", tensor)
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.write_tensors_to_file()
    model.close()


def serve(path):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 4096  # tokens, most of them a byte of the prompt
    params.n_predict = 3000  # tokens of an answer
    params.n_parallel = 1
    params.use_jinja = True
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.pause()  # until the test ends it


if __name__ == "__main__":
    path = os.path.join(sys.argv[1], "says.gguf")
    write_model(path)
    serve(path)
