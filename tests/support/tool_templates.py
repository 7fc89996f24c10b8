"""Chat templates that write tool calls in the forms that are about."""

MARKED = (  # calls in marks, one by one, as many open models write them
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (  # nothing but the JSON, with other keys
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}] "
    "{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
LISTED = (  # all calls in one list behind a mark
    "{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[CALLS][{% for c in m.tool_calls %}"
    '{"function": {{ c.function | tojson }}, "id": "{{ c.id }}"}{{ "," if not loop.last }}'
    "{% endfor %}]<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
TAGGED = (  # no JSON at all, and a key on both sides of its value
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call name={{ c.function.name }}>"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</call>"
    "{% endfor %}<|im_end|>{% endfor %}"
)
THINKING = MARKED.replace(  # an empty thought before every answer behind the last question
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
THOUGHTFUL = THINKING.replace(  # ends within a thought, which is empty where none is wanted
    "assistant\n{% endif %}",
    "assistant\n<think>\n{% if enable_thinking is defined and not enable_thinking %}"
    "\n</think>\n\n{% endif %}{% endif %}",
)
TEXTUAL = MARKED.replace(  # joins the arguments to its own text
    "{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"
)
NUMBERED = MARKED.replace("<tool_call>", "<tool_call id={{ c.id }}>")  # the mark is each call's own
SPECIAL = (  # the mark begins with a special token, and what ends a call ends the answer
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<|im_start|>call\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</call><|im_end|>\n{% endfor %}{% if not m.tool_calls %}.{% endif %}{% endfor %}"
)
LINES = MARKED[: MARKED.index("{% for c in")] + (  # Python, a call a line
    "{% if m.tool_calls %}<function_calls>\n{% for c in m.tool_calls %}{{ c.function.name }}("
    "{% for k, v in c.function.arguments.items() %}{{ k }}="
    "{{ \"'\" + v + \"'\" if v is string else v | tojson }}{{ ', ' if not loop.last }}{% endfor %})"
    "\n{% endfor %}</function_calls>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEYED = LISTED.replace(  # the name is a key
    "[CALLS][{% for c in m.tool_calls %}"
    '{"function": {{ c.function | tojson }}, "id": "{{ c.id }}"}{{ "," if not loop.last }}'
    "{% endfor %}]",
    '<tools>[{% for c in m.tool_calls %}{"{{ c.function.name }}": '
    '{{ c.function.arguments | tojson }}}{{ ", " if not loop.last }}{% endfor %}]</tools>',
)
TWICE = MARKED.replace("<tool_call>", "<tool_call to={{ c.function.name }}>")
UNCLOSED = TAGGED.replace("</{{ k }}>", " ")  # no telling where a value ends
BROKEN = MARKED + "{{ messages[7].content + 1 }}"  # fails in its own code
