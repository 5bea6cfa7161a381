from __future__ import annotations


async def test_smoke(gateway):
    r = await gateway.chat()
    print(r.status_code, r.text, r.headers)
    for c in await gateway.chunks(stream_options={"include_usage": True}):
        print(c)
    print((await gateway.http.get("/metrics")).text[:3000])
    assert r.status_code == 200
