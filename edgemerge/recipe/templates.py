"""Chat templates by name, as recipes may give them.

The texts are ours; the formats are public. No text depends on how a renderer trims blocks.
"""

from __future__ import annotations

__all__ = ["CHAT_TEMPLATES"]

# OpenAI's ChatML: every message between <|im_start|> with its role, and <|im_end|>.
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# Meta's Llama 3: the role between header ids, then the trimmed message, ended by <|eot_id|>.
LLAMA3 = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)

# Mistral's instruct models: [INST] around the user, the system's text before the first user's.
MISTRAL = (
    "{{- bos_token -}}"
    "{%- set said = namespace(system='', turn=0) -%}"
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] == 'system' -%}"
    "{%- set said.system = message['content'] + '\\n\\n' -%}"
    "{%- elif message['role'] != ('user' if said.turn % 2 == 0 else 'assistant') -%}"
    "{{- raise_exception('user and assistant must take turns, after one system message at most') -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- ' [INST] ' + said.system + message['content'] + ' [/INST]' -}}"
    "{%- set said.system = '' -%}{%- set said.turn = said.turn + 1 -%}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- set said.turn = said.turn + 1 -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# Stanford Alpaca: the system's text, then headings for instruction, input and response.
ALPACA = (
    "{%- set said = namespace(system='') -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- set said.system = message['content'] | trim -%}"
    "{%- endfor -%}"
    "{{- said.system + '\\n\\n' -}}"
    "{%- set headings = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] in headings -%}"
    "{{- '### ' + headings[message['role']] + ':\\n' + message['content'] | trim -}}"
    "{{- '\\n\\n' if not loop.last else '' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}"
    "{{- '\\n\\n### Response:\\n' -}}"
    "{%- endif -%}"
)

# LG's EXAONE 3: [|role|] before a message; [|endofturn|] ends all but the user's.
EXAONE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}"
    "{{- '[|system|][|endofturn|]\\n' -}}"
    "{%- endif -%}"
    "{{- '[|' + message['role'] + '|]' + message['content'] -}}"
    "{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}"
)

CHAT_TEMPLATES = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "exaone": EXAONE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}
