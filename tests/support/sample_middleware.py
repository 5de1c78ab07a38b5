"""What --middleware may name: classes and a function as people write them."""


class Named:
    """Adds a header; `order` grows from the inside out."""

    name = b"inner"

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def named(message):
            if message["type"] == "http.response.start":
                before = dict(message["headers"]).get(b"x-order", b"")
                rest = [item for item in message["headers"] if item[0] != b"x-order"]
                message = message | {"headers": [*rest, (b"x-order", before + self.name + b";")]}
            await send(message)

        await self.app(scope, receive, named)


class Outer(Named):
    name = b"outer"


class Closed:
    """Lets nobody in but those who know the word."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if dict(scope["headers"]).get(b"x-word") == b"sesame":
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 418, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"no"})


class Broken:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        raise RuntimeError("/secret/path")


class Silent(Broken):
    async def __call__(self, scope, receive, send):
        pass


class Echo(Broken):
    """Answers with the scope and the body it was given."""

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        places = (scope["path"].encode(), scope["raw_path"], scope["query_string"])
        said = b"%b %b %b?%b %b" % (scope["method"].encode(), *places, body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said, "more_body": True})
        await send({"type": "http.response.body", "body": b"!"})


async def timed(request, call_next):
    """As Starlette has it."""
    response = await call_next(request)
    response.headers["x-path"] = request.url.path
    return response


NOT_ONE = 3
