"""POST /tokenize and /detokenize"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from server.gateway.openapi import Text, Tokens, documented
from server.gateway.parsing import json_body
from server.gateway.schemas import DetokenizeBody, TokenizeBody
from server.gateway.state import CallerDep, GatewayDep
from server.worker.messages import ChatPrompt, DetokenizeRequest, Prompt, TextPrompt, TokenizeRequest

router = APIRouter()


@router.post("/tokenize", **documented("Text or messages to token ids", Tokens, TokenizeBody))
async def tokenize(
    body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))], gateway: GatewayDep, caller: CallerDep
) -> Response:
    caller.check_model(body.model)
    prompt: Prompt
    if body.messages is not None:
        tools = tuple(tool.for_template() for tool in body.tools or ())
        prompt = ChatPrompt(tuple(message.for_worker() for message in body.messages), tools=tools)
    else:
        prompt = TextPrompt(body.prompt or "", body.add_special_tokens is not False)
    answer = await gateway.pool.tokenize(TokenizeRequest(body.model, prompt))
    return JSONResponse(
        {
            "tokens": answer.token_ids,
            "count": len(answer.token_ids),
            "max_model_len": answer.max_model_len,
        }
    )


@router.post("/detokenize", **documented("Token ids to text", Text, DetokenizeBody))
async def detokenize(
    body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))],
    gateway: GatewayDep,
    caller: CallerDep,
) -> Response:
    caller.check_model(body.model)
    answer = await gateway.pool.detokenize(DetokenizeRequest(body.model, tuple(body.tokens)))
    return JSONResponse({"prompt": answer.text})
