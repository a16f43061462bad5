"""Chat templates in the manner of real models, and conversations to render with them."""

from typing import Any

MIXTRAL = """{{ bos_token }}{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] | trim %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant, found ' + message['role']) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('only user and assistant are known') }}
    {%- endif %}
{%- endfor %}"""

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
<|im_start|>{{ message.role }}
{{ message.content if message.content is string else message.content | tojson }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\nSignatures within <tools></tools> tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' }}{{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string
                else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

OLMOE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}
{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] | string + '\\n' }}
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n'  + message['content'] }}
{% if not loop.last %}{{ eos_token + '\\n' }}{% else %}{{ eos_token }}{% endif %}
{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{% endfor %}"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%B %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{{- system_message ~ "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first = messages[0]['content'] %}{%- set messages = messages[1:] %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{{- first }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {{- message.tool_calls[0].function.name ~ message.tool_calls[0].function | tojson }}
    {%- elif message.content is mapping or message.content is iterable and message.content
        is not string %}{{- message.content | tojson }}
    {%- else %}{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}"""

MACROS = """{%- macro type_of(value) -%}
    {%- if value is mapping -%}{ {%- for k, v in value | dictsort -%}
        {{ k }}: {{ type_of(v) }}{{ ', ' if not loop.last }}
    {%- endfor -%} }
    {%- elif value is string -%}string
    {%- elif value is sequence -%}[{{ type_of(value | first) if value else '' }}]
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- macro wrap(tag) -%}<{{ tag }} {{ varargs | join(' ') }} {{ kwargs | tojson }}>
    {{- caller() | indent(2) }}</{{ tag }}>{%- endmacro -%}
{%- for tool in tools or [] %}{{ type_of(tool) }}
{% endfor -%}
{%- for message in messages %}{% call wrap(message.role, 'x', n=loop.index) %}
{{ message.content }}
second{% endcall %}{% endfor %}"""

TRAINING = """{% for message in messages %}{% set shown = message.content | default('none', true) %}
{% if message.role == 'assistant' %}{% generation %}{% set shown = 'inner' %}
{{ message.content }}{{ shown }}{{ loop.index }}{% endgeneration %}{% else %}{{ shown }}{% endif %}
{{ shown }}{% endfor %}"""

LOOPS = """{%- set seen = namespace(n=0, names=[]) -%}
{%- for message in messages if message.role != 'system' -%}
    {%- if loop.index > 4 -%}{%- break -%}{%- endif -%}
    {%- if not message.content -%}{%- continue -%}{%- endif -%}
    {%- set seen.n = seen.n + 1 -%}{%- set seen.names = seen.names + [message.role] -%}
    {{ loop.cycle('odd', 'even') }} {{ loop.previtem.role if loop.previtem is defined }}
    {{ loop.nextitem.role if loop.nextitem is defined else 'end' }} {{ loop.changed(message.role) }}
    {%- for n in range(loop.revindex) %}{{ n ** 2 }}{% endfor -%}
{%- else -%}nobody{%- endfor -%}
{{ seen.n }}{{ seen.names | unique | sort(reverse=true) | join('+') }}"""

FILTERS = """{{ messages | map(attribute='role') | join(',') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | rejectattr('content', 'string') | list | count }}
{{ (messages | last).role | upper | replace('S', '$') | title | center(20) }}|
{{ tools | default([], true) | map(attribute='function.name', default='?') | list }}
{{ messages[0] | items | map('first') | list }} {{ messages[0].keys() | list }}
{{ "%s-%d" | format('a', 3) }} {{ '{:>4}|{}'.format(7, 'b') }} {{ 'a,b,c'.split(',')[-1] }}
{{ [3, 1, 2] | sort | batch(2) | list }} {{ 7 // 2 }} {{ 7 % 4 }} {{ '=' * 5 }}
{{ 3.14159 | round(2) }} {{ 'abc'[::-1] }} {{ 'x' in 'xyz' }} {{ none is none }}
{{ missing is defined }} {{ '<&>' | escape }}
{{ {'a': [1, none, true], 'ü': '<\\u2028&>'} | tojson(ensure_ascii=true, sort_keys=true) }}
{{ dict(a=1, b=2).items() | list }} {{ messages | tojson(separators=(',', ':')) }}
{%- set text %}
  block {{ messages | length }}
{%- endset %}{{ text | trim | length }}{% filter upper %}loud{% endfilter %}
{% set pipe = joiner('; ') %}{% for i in range(3) %}{{ pipe() }}{{ i }}{% endfor %}
{% set row = cycler('a', 'b') %}{{ row.next() }}{{ row.next() }}{{ row.current }}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}
        {{ '<|User|>' ~ message['content'] }}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}NONE
    {%- elif message['role'] == 'assistant' and message['content'] is defined %}
        {%- if '</think>' in message['content'] %}
            {%- set content = message['content'].split('</think>')[-1] %}
        {%- else %}{%- set content = message['content'] %}{%- endif -%}
        {{ '<|Assistant|>' + content + eos_token }}
    {%- endif %}
    {%- if message['thinking'] is defined %}[{{ message.thinking }}]{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

TEMPLATES = {
    "mixtral": MIXTRAL,
    "chatml": CHATML,
    "qwen": QWEN,
    "olmoe": OLMOE,
    "llama": LLAMA,
    "gemma": GEMMA,
    "macros": MACROS,
    "training": TRAINING,
    "loops": LOOPS,
    "filters": FILTERS,
    "deepseek": DEEPSEEK,
    "empty": "",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a <place> & its "surroundings", say 東京',
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["place"],
        },
    },
}

Message = dict[str, Any]

CONVERSATIONS: dict[str, list[Message]] = {
    "one": [{"role": "user", "content": "Hi there"}],
    "system": [
        {"role": "system", "content": "  Be terse.\n"},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Rayleigh."},
        {"role": "user", "content": "And at dusk?"},
    ],
    "unicode": [
        {
            "role": "user",
            "content": "<b>naïve</b> & \"quoted\" '日本語' 👩‍👩‍👧 \u2028 \\n {{ x }} {% y %}",
        },
        {"role": "assistant", "content": "‏שלום\t\r\n"},
        {"role": "user", "content": ""},
    ],
    "thinking": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "reasoning_content": "add again", "content": "6"},
        {"role": "assistant", "thinking": "older name", "content": "7"},
    ],
    "calls": [
        {"role": "user", "content": "Weather in Oslo and 東京?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"place": "東京"}},
                },
            ],
        },
        {"role": "tool", "name": "get_weather", "content": '{"temp": 21.5}'},
        {"role": "tool", "name": "get_weather", "content": "rain"},
        {"role": "assistant", "content": "Mild."},
    ],
    "text calls": [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}},
                {"id": "b", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
    ],
    "no content": [
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "a", "content": "done"},
    ],
}
