"""A token that is given, or lies in the environment, is in no output, log, error, card, provenance or other file."""

from __future__ import annotations

from citer_hf.runs import anonymous
from tests.test_hub import OTHERS_TOKEN, TOKEN, WRONG_TOKEN, client  # noqa: F401 - `client` is a fixture

SECRETS = (TOKEN, OTHERS_TOKEN, WRONG_TOKEN)

# A router's whole life, with everything said that can be said.
LIFE = """
    import pickle, traceback
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer
    from typer.testing import CliRunner
    from citer_hf.cli import app
    from citer_hf.evaluation.evaluate import evaluate
    from citer_hf.data.examples import read_examples
    from tests.evaluation_data import has_letter

    logging.basicConfig(level=logging.DEBUG)
    for name in ("citer_hf", "transformers", "huggingface_hub", "httpx", "urllib3"):
        logging.getLogger(name).setLevel(logging.DEBUG)

    api = HfApi(token=TOKEN)
    for role in ("slm", "llm"):
        api.create_repo(f"me/{role}", private=True)
        api.upload_folder(repo_id=f"me/{role}", folder_path=role)
    pair = CiterForCausalLM.from_pair("me/slm", "me/llm", router="mlp", token=TOKEN)
    pair.save_pretrained("router", push_to_hub=True, repo_id="me/router", private=True, token=TOKEN)
    pair = CiterForCausalLM.from_pretrained("me/router", token=TOKEN)
    pipeline("text-generation", model="me/router", token=TOKEN)("w5 w6", max_new_tokens=3)
    rows = [{"prompt": f"w{n} w6", "answer": "w"} for n in (5, 7)]
    evaluate(pair, read_examples(rows), "exact", shares=(0.5,), max_new_tokens=3, out=Path("out"))
    for name in ("results.json", "curve.png"):
        Path("router", name).write_bytes(Path("out", name).read_bytes())
    pair.save_pretrained("again", save_base_models=True)
    pickle.dump(pair, open("pair.pickle", "wb"))
    said["kept"] = [one._repository[1] for one in (pair, pickle.load(open("pair.pickle", "rb")))]
    said["tokenizer"] = pair.load_tokenizer() is not None
    print(vars(pair), pair, pair.config, vars(pair.config), pair.generation_config)

    run = lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])
    data = Path("data.jsonl")
    data.write_text("".join(json.dumps(row) + "\\n" for row in rows))
    measure = ("--data", data, "--checker", "exact", "--max-new-tokens", 3, "--shares", "0.5")
    commands = [
        ("push", "router", "me/router"),
        ("evaluate", "me/router", *measure, "--out", "out2"),
        ("push", "router", "you/router"),
        ("evaluate", "me/nothing", *measure, "--out", "out3"),
        ("chat", "you/nothing"),
    ]
    said["exits"] = {}
    for who, token in (("good", TOKEN), ("wrong", WRONG)):
        os.environ["HF_TOKEN"] = token
        results = [run(*command) for command in commands]
        said["exits"][who] = [result.exit_code for result in results]
        print([result.output for result in results])
    del os.environ["HF_TOKEN"]

    load = CiterForCausalLM.from_pretrained
    calls = [
        lambda: load("me/router", token=WRONG, force_download=True),
        lambda: load("me/nothing", token=TOKEN),
        lambda: load("me/router", token=TOKEN, revision="no-such"),
        lambda: load("me/router", token=TOKEN, llm_name_or_path="me/nothing"),
        lambda: load("me/router", token=TOKEN, llm_token=WRONG, force_download=True),
        lambda: load("me/router", token=TOKEN, no_such_keyword=1),
        lambda: load("me/router", token=TOKEN, router_threshold=-1),
        lambda: CiterForCausalLM.from_pair("me/slm", "me/nothing", token=TOKEN),
        lambda: CiterForCausalLM.from_pair("me/slm", "me/llm", router="me/nothing", token=TOKEN),
        lambda: pair.push_to_hub("you/router", token=TOKEN),
        lambda: pair.push_to_hub("me/router", token=WRONG),
        lambda: pair.push_to_hub("me/router", token=TOKEN, no_such_keyword=1),
        lambda: AutoModelForCausalLM.from_pretrained("me/nothing", token=WRONG),
        lambda: AutoTokenizer.from_pretrained("me/router", token=WRONG, force_download=True),
    ]
    said["raised"] = 0
    for call in calls:
        try:
            call()
        except Exception as caught:
            said["raised"] += 1
            traceback.print_exc()
            print(repr(caught), caught.args)
    said["calls"] = len(calls)
"""


def test_a_token_is_nowhere(client):  # noqa: F811
    said = client.run(LIFE)
    assert said["exits"] == {"good": [0, 0, 1, 1, 1], "wrong": [1, 1, 1, 1, 1]}
    assert said["raised"] == said["calls"] and said["tokenizer"]
    assert not any("token" in kept for kept in said["kept"])
    assert "DEBUG:" in client.output and not [secret for secret in SECRETS if secret in client.output]
    holding = [
        str(file.relative_to(client.folder))
        for file in client.folder.rglob("*")
        if file.is_file() and any(secret.encode() in file.read_bytes() for secret in SECRETS)
    ]
    assert not holding
    for name, repository in client.hub.repositories.items():
        for commit in repository.commits.values():
            for path, blob in commit.items():
                assert not any(secret.encode() in blob.content for secret in SECRETS), (name, path)


def test_a_token_within_a_text_is_not_published():
    text = "hf_ is how they start; citer_hf_settings is none, hf_0123456789abcdef is"
    assert anonymous([text]) == [text.replace("hf_0123456789abcdef", "hf_...")]
    nested = {"token": TOKEN, "data": f"http://me:{TOKEN}@hub/data", "list": [f"--token={TOKEN}"]}
    assert anonymous(nested) == {"token": "hf_...", "data": "http://me:hf_...@hub/data", "list": ["--token=hf_..."]}
