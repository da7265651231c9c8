"""The built-in prompts: what a model is calibrated on when the user gives no text.

The model answers the questions in its chat format and continues the openings as plain text, because both kinds of
text reach a server. Diversity is what matters: a covariance measured on prose alone serves code badly.
"""

from __future__ import annotations

QUESTIONS: tuple[str, ...] = (
    # prose and knowledge
    "Write a short story about a lighthouse keeper who finds a letter that was meant for someone else.",
    "Explain to a curious teenager why the sky is blue in the daytime and red at sunset.",
    "Summarize the main causes of the French Revolution in three paragraphs.",
    "Describe how vaccines train the immune system, and name two things that people often get wrong about it.",
    "Compare renting and buying a home. When does each make sense?",
    "What should I check before I sign a contract for a used car?",
    "Write a review of a small restaurant that serves excellent soup but has very slow service.",
    "Give me a recipe for vegetable curry for four people, with quantities and times.",
    "List ten important rivers with the countries they flow through, as a table.",
    # code
    "Write a Python function that merges two sorted lists, with a docstring and three tests.",
    "Explain what a race condition is and show one in Java together with its fix.",
    "Write an SQL query that finds the five customers with the highest total of orders in 2023.",
    "Implement a binary search tree in C++ with insert, find and an in-order traversal.",
    "Write a shell script that renames all .jpeg files below a directory to .jpg and reports how many it changed.",
    "Create a small HTML page with a form for name and e-mail, and validate it with JavaScript.",
    "Return a JSON object that describes a book: title, authors, year, ISBN, and a list of chapters with page numbers.",
    # mathematics and reasoning
    "Solve the equation 3x^2 - 12x + 9 = 0 step by step and check the result.",
    "A train leaves at 14:35 and arrives at 18:10 after 287 km. What is its average speed? Show the calculation.",
    "Prove that the sum of two odd numbers is even, then that the square root of 2 is irrational.",
    "Explain Bayes' theorem with a numerical example about a medical test.",
    "What is the derivative of x^2 sin(x)? Explain each rule that you use.",
    # dialogue
    "Write a conversation between a patient teacher and a student who is afraid of mathematics.",
    "Act as a support agent: my parcel was marked as delivered, but it never arrived. What now?",
    "Write a scene for a play in which two old friends meet at a railway station after twenty years.",
    # several languages
    "Raconte en français l'histoire d'un boulanger qui perd son chat un matin d'hiver.",
    "Erkläre auf Deutsch, wie ein Kühlschrank funktioniert.",
    "Escribe en español una carta formal para pedir un certificado a la universidad.",
    "Descrivi in italiano una passeggiata in montagna in autunno.",
    "请用中文介绍一下长城的历史。",
    "日本の四季について短い文章を書いてください。",
    "Напиши по-русски короткий рассказ о первом снеге.",
    "اكتب فقرة قصيرة باللغة العربية عن أهمية القراءة.",
)
"""Asked in the model's chat format, if it has one."""

OPENINGS: tuple[str, ...] = (
    # prose
    "It was late in October when the last of the summer guests left the island, and the ferry, which had come twice"
    " a day since May, went over to its winter timetable. Mrs. Hale stood at the window of the post office and watched",
    "The history of the printing press in Europe is usually told as the story of one inventor. But paper mills, metal"
    " casting and a market for indulgences had each prepared the ground. By 1480 there were presses in more than",
    "Abstract. We study how the thickness of sea ice responds to changes in cloud cover. Using satellite observations"
    " between 1998 and 2016, we find that the winter growth rate falls by",
    "LONDON - Shares fell on Tuesday after the central bank said that it would keep interest rates unchanged for the"
    " rest of the year, disappointing investors who had expected",
    "Section 4. Termination. Either party may terminate this agreement upon thirty (30) days' written notice to the"
    " other party. In the event of a material breach, the non-breaching party shall",
    "Dear Dr. Okafor,\n\nThank you for your letter of 3 March about the results of the blood test. I have looked at"
    " the figures again with my colleague, and",
    "Photosynthesis takes place in the chloroplasts, where chlorophyll absorbs light mainly in the blue and red parts"
    " of the spectrum. The light-dependent reactions produce",
    # code
    '#!/usr/bin/env python3\n"""Command line tool that counts the words in text files."""\n\nimport argparse\n'
    "import collections\nimport pathlib\nimport re\n\n\nclass WordCounter:\n    def __init__(self, minimum=1):\n",
    'def read_config(path, *, encoding=\'utf-8\', strict=False):\n    """Parse a configuration file.\n\n    Args:\n'
    "        path: The file to read.\n        strict: Raise on unknown keys.\n\n    Returns:\n        A dictionary.\n"
    '    """\n    result = {}\n    with open(path, encoding=encoding) as stream:\n',
    "import os\nimport sys\nimport unittest\nfrom unittest import mock\n\n\nclass TestPathHandling(unittest.TestCase):\n"
    "    def setUp(self):\n        self.directory = os.getcwd()\n\n    def test_join_relative(self):\n",
    "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n\nstruct node {\n    char *key;\n    int value;\n"
    "    struct node *next;\n};\n\nstatic struct node *table[1024];\n\nint insert(const char *key, int value)\n{\n",
    "'use strict';\n\nconst express = require('express');\nconst router = express.Router();\n\n"
    "router.get('/users/:id', async (req, res, next) => {\n  try {\n    const user = await",
    'package cache\n\nimport (\n\t"sync"\n\t"time"\n)\n\n// Cache is a map with expiring entries.\ntype Cache struct'
    " {\n\tmu    sync.RWMutex\n\titems map[string]item\n}\n\nfunc (c *Cache) Get(key string)",
    "class _Parser:\n    def __init__(self, tokens):\n        self._tokens = list(tokens)\n        self._index = 0\n\n"
    "    def _peek(self):\n        if self._index < len(self._tokens):\n            return self._tokens[self._index]\n"
    "        raise SyntaxError('unexpected end')\n\n    def parse_expression(self):\n",
    "CREATE TABLE orders (\n    id INTEGER PRIMARY KEY,\n    customer_id INTEGER NOT NULL REFERENCES customers(id),\n"
    "    placed_at TIMESTAMP NOT NULL,\n    total NUMERIC(10, 2)\n);\n\nSELECT",
    # configuration, logs, markup
    "version: '3'\nservices:\n  web:\n    image: nginx:latest\n    ports:\n      - \"80:80\"\n    depends_on:\n",
    "2023-05-14 08:12:03,117 INFO  [worker-3] request id=8841 path=/api/items status=200 time=14ms\n2023-05-14 08:12:03,"
    "342 WARN  [worker-1] request id=8842 path=/api/items/77 status=404 time=3ms\n",
    "# Installation\n\n## Requirements\n\n- Python 3.10 or newer\n- A C compiler\n\n## Quick start\n\n```bash\ngit clone",
    "The following table lists the options of the command:\n\n+-----------+---------+------------------------------+\n"
    "| Option    | Default | Description                  |\n+===========+=========+==============================+\n",
    # mathematics
    "Theorem 2. Let $f$ be continuous on $[a, b]$ and differentiable on $(a, b)$. Then there exists a point $c$ such"
    " that $f(b) - f(a) = f'(c)(b - a)$.\n\nProof.",
    "Problem: A box holds 5 red, 7 blue and 8 green balls. Two balls are drawn without replacement. What is the"
    " probability that both are blue?\n\nSolution:",
    # dialogue
    "A: Did you manage to fix the heating?\nB: Not yet. The man from the company said that the pump is broken.\nA: And"
    " when are they going to replace it?\nB:",
    "INTERVIEWER: You grew up on a farm, far from any city. How did you come to astronomy?\nHOLM: By accident,"
    " really. My grandmother had",
    # several languages
    "La ville de Lyon, située au confluent du Rhône et de la Saône, est connue depuis l'Antiquité pour",
    "Der Bundestag hat am Donnerstag nach langer Debatte ein Gesetz beschlossen, das",
    "El agua es un recurso limitado. En muchas regiones del mundo, los agricultores",
)
"""Continued as plain text."""
