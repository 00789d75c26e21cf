"""A server over a fake engine process: ``fake_server.py MODEL_DIR SERVER_OPTIONS ENGINE_OPTIONS`` (JSON)."""

import json
import sys
from pathlib import Path

from llmopt.errors import LlmoptError
from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.app import Access
from llmopt.serve.limits import Limits
from llmopt.serve.logs import Log
from llmopt.serve.security import ApiKeys
from llmopt.serve.server import ServerOptions, serve

if __name__ == "__main__":
    model, server, engine = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    tokenizer = Tokenizer.load(model / "tokenizer.json", model / "tokenizer_config.json")
    chat = ChatTemplate((model / "chat_template.jinja").read_text(), {}) if engine.pop("chat", True) else None

    def command(descriptor):
        return [sys.executable, "-m", "tests.serve.fake_engine", str(descriptor), json.dumps(engine)]

    keys, origins = ApiKeys(server.pop("keys", {})), tuple(server.pop("origins", ()))
    access = Access(keys, origins, Log(server.pop("log", False)))
    limits = Limits(**server.pop("limits", {}))
    options = ServerOptions(**{"port": 0, "model_name": "fake", "limits": limits, "access": access, **server})
    try:
        serve(options, command, tokenizer, chat, lambda url: print(url, flush=True))
    except LlmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
