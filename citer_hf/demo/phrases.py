"""Every word a problem can be told with.

A `{field}` stands for a fact of the problem (`{name}`, `{n}`, `{equation}`) or for any one phrase of that name here.
"""

__all__ = ["ITEMS", "NAMES", "PHRASES", "THINGS"]

NAMES = {
    "Tom": "he",
    "Ben": "he",
    "Sam": "he",
    "Leo": "he",
    "Anna": "she",
    "Mia": "she",
    "Eva": "she",
    "Zoe": "she",
}

ITEMS = ["apples", "marbles", "cards", "shells", "stamps", "books", "pencils", "beads"]

THINGS = ["hats", "cups", "keys", "pens"]

PHRASES = {
    "then": ["Then", "Next", "Later", "After that"],
    "who": ["{name}", "{he}"],
    "now": ["now", "in the end", "at the end"],
    # The prompt.
    "opening": [
        "{name} has {start} {items}.",
        "{name} starts with {start} {items}.",
        "There are {start} {items} in the box of {name}.",
        "{name} and {friend} meet. {name} has {start} {items}.",
    ],
    "add": [
        "{then} {who} {gains} {n} more.",
        "{then} {who} {gains} {n} {items}.",
        "{then} {friend} gives {name} {n} more {items}.",
        "{n} more {items} are put in the box.",
    ],
    "gains": ["buys", "finds", "gets", "wins"],
    "take": [
        "{then} {who} {drops} {n} {items}.",
        "{then} {who} {drops} {n} of them.",
        "{then} {friend} takes {n} of the {items}.",
        "{n} of the {items} are taken away.",
    ],
    "drops": ["loses", "sells", "uses", "gives away"],
    "multiply": [
        "{then} the number of {items} grows {n} times.",
        "{then} {who} has {n} times as many.",
        "{then} {who} has {n} times as many {items}.",
        "{then} the number is multiplied by {n}.",
    ],
    "distraction": [
        "{friend} has {n} {things}.",
        "{friend} is {n} years old.",
        "The box costs {n} coins.",
        "There are also {n} {things} in the room.",
    ],
    "question": [
        "How many {items} does {name} have {now}?",
        "How many {items} are there {now}?",
        "What is the number of {items} {now}?",
    ],
    # The response.
    "next": ["Then", "Next", "Now", "After that"],
    "solution opening": [
        "{name} starts with {start} {items}.",
        "At first {name} has {start} {items}.",
        "At first there are {start} {items}.",
        "We start with {start} {items}.",
    ],
    "solution add": [
        "{next} {who} {gains} {n} more, {so} {equation}{unit}.",
        "{next} we add {n} to {before}, {so} {equation}{unit}.",
        "{n} more {items} are added, {so} {equation}{unit}.",
    ],
    "solution take": [
        "{next} {who} {drops} {n}, {so} {equation}{unit}.",
        "{next} we take {n} from {before}, {so} {equation}{unit}.",
        "{n} of the {items} are taken away, {so} {equation}{unit}.",
    ],
    "solution multiply": [
        "{next} {who} has {n} times as many, {so} {equation}{unit}.",
        "{next} we multiply {before} by {n}, {so} {equation}{unit}.",
        "The number grows {n} times, {so} {equation}{unit}.",
    ],
    "so": ["so", "so now", "which makes", "and that gives"],
    "unit": ["", " {items}"],
    "solution end": [
        "So the answer is {answer}.",
        "So {name} has {answer} {items} {now}.",
        "{finally} there are {answer} {items}.",
    ],
    "finally": ["Now", "In the end", "At the end"],
}
