// The official JavaScript client against the service.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from 'openai/helpers/zod';
import { baseURL, byHand, greedy, isWeather, questions, room, Weather } from './support.js';

const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const { completions } = client.chat;

const weather = zodFunction({ name: 'weather', description: 'Get the weather of a city', parameters: Weather });
const called = { type: 'function', function: { name: 'weather' } };

for (const [kind, question] of Object.entries(questions)) {
  test(`an answer, ${kind}`, async () => {
    const answer = await client.chat.completions.create({ ...question, ...greedy });
    assert.equal(answer.choices[0].message.content, await byHand(question));
    assert.equal(answer.model, question.model);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.ok(answer._request_id);
  });

  test(`a stream, ${kind}`, async () => {
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await Array.fromAsync(await client.chat.completions.create({ ...question, ...greedy, ...options }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join(''), await byHand(question));
    assert.ok(chunks.at(-1).usage.completion_tokens > 0);
  });

  test(`the stream helper, ${kind}`, async () => {
    const final = await client.chat.completions.stream({ ...question, ...greedy }).finalChatCompletion();
    assert.equal(final.choices[0].message.content, await byHand(question));
    assert.ok(['stop', 'length'].includes(final.choices[0].finish_reason));
  });

  test(`a schema is kept to, ${kind}`, async () => {
    const asked = { ...question, ...room, response_format: zodResponseFormat(Weather, 'weather') };
    const parsed = (await completions.parse(asked)).choices[0].message.parsed;
    isWeather(parsed);
    const streamed = await completions.stream(asked).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.parsed, parsed);
  });

  test(`a tool is called and its result answered, ${kind}`, async () => {
    const asked = { ...question, ...room, tools: [weather], parallel_tool_calls: false };
    const answer = await completions.parse({ ...asked, tool_choice: 'required' });
    const [{ finish_reason, message }] = answer.choices;
    assert.deepEqual([finish_reason, message.content, message.tool_calls.length], ['tool_calls', null, 1]);
    const [call] = message.tool_calls;
    assert.equal(call.function.name, 'weather');
    isWeather(call.function.parsed_arguments);

    const result = { role: 'tool', tool_call_id: call.id, content: 'rain' };
    const messages = [...question.messages, message, result];
    const told = await completions.create({ ...asked, messages, tool_choice: 'none' });
    assert.equal(told.choices[0].message.tool_calls, undefined);
    const plain = await completions.create({ ...question, ...greedy });
    assert.ok(told.usage.prompt_tokens > plain.usage.prompt_tokens);
  });

  test(`a tool is called in a stream, ${kind}`, async () => {
    const asked = { ...question, ...room, tools: [weather], tool_choice: called, stream: true };
    const chunks = await Array.fromAsync(await completions.create(asked));
    const [first, ...rest] = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
    assert.ok(first.id);
    assert.deepEqual([first.index, first.type, first.function.name], [0, 'function', 'weather']);
    for (const piece of rest) assert.deepEqual([piece.index, piece.id, piece.function.name], [0, undefined, undefined]);
    isWeather(JSON.parse([first, ...rest].map((piece) => piece.function.arguments).join('')));
    assert.equal(chunks.at(-1).choices[0].finish_reason, 'tool_calls');

    const helped = await completions.stream({ ...asked, tools: [weather] }).finalChatCompletion();
    isWeather(helped.choices[0].message.tool_calls[0].function.parsed_arguments);
  });

  test(`the helper that runs tools, ${kind}`, async () => {
    const seen = [];
    const runnable = zodFunction({ name: 'weather', parameters: Weather, function: (given) => seen.push(given) });
    await completions.runTools({ ...question, ...room, tools: [runnable], tool_choice: called }).done();
    assert.equal(seen.length, 1);
    isWeather(seen[0]);
  });
}

// The same questions to the Responses API.
const toItem = ({ role, content }) => ({ role, content: typeof content === 'string' ? content : content.map(toPart) });
const toPart = ({ text, image_url }) => (image_url
  ? { type: 'input_image', image_url: image_url.url, detail: 'auto' }
  : { type: 'input_text', text });

for (const [kind, { model, messages }] of Object.entries(questions)) {
  const question = { model, input: messages.map(toItem), temperature: 0 };
  const roomy = { ...question, max_output_tokens: room.max_tokens };

  test(`a response, ${kind}`, async () => {
    const asked = { ...question, max_output_tokens: greedy.max_tokens };
    const answer = await client.responses.create(asked);
    assert.equal(answer.output_text, await byHand(questions[kind]));
    const stream = client.responses.stream(asked);
    const events = await Array.fromAsync(stream);
    const pieces = events.filter(({ type }) => type === 'response.output_text.delta').map(({ delta }) => delta);
    assert.equal(pieces.join(''), answer.output_text);
    const final = await stream.finalResponse();
    assert.equal(final.output_text, answer.output_text);
    assert.equal(final.usage.output_tokens, answer.usage.output_tokens);
  });

  test(`a response keeps to a schema, ${kind}`, async () => {
    const asked = { ...roomy, text: { format: zodTextFormat(Weather, 'weather') } };
    isWeather((await client.responses.parse(asked)).output_parsed);
  });

  test(`a response calls a tool, ${kind}`, async () => {
    const tool = zodResponsesFunction({ name: 'weather', description: 'Get the weather', parameters: Weather });
    const asked = { ...roomy, tools: [tool], parallel_tool_calls: false };
    const { output: [call, ...more] } = await client.responses.parse({ ...asked, tool_choice: 'required' });
    assert.deepEqual([call.type, call.name, more], ['function_call', 'weather', []]);
    isWeather(call.parsed_arguments);
    const result = { type: 'function_call_output', call_id: call.call_id, output: 'rain' };
    const input = [...question.input, call, result];
    const told = await client.responses.create({ ...asked, input, tool_choice: 'none' });
    assert.deepEqual(told.output.map(({ type }) => type), ['message']);
  });
}

test('any JSON object', async () => {
  const tokenize = { model: 'poet', prompt: '}', add_special_tokens: false };
  const { tokens: [brace] } = await client.post('/../tokenize', { body: tokenize });
  const asked = { ...questions.text, ...room, logit_bias: { [brace]: 100 } }; // it ends as soon as it may
  const answer = await completions.create({ ...asked, response_format: { type: 'json_object' } });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), {});
});

test('the image is seen', async () => {
  const blind = { ...questions.text, model: 'sight' };
  assert.notEqual(await byHand(questions.image), await byHand(blind));
});

test('leaving a stream', async () => {
  const stream = await client.chat.completions.create({ ...questions.text, max_tokens: 300, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.choices[0].delta.role, 'assistant');
    break;
  }
  assert.ok(stream.controller.signal.aborted);
  assert.equal((await client.chat.completions.create({ ...questions.text, ...greedy })).choices.length, 1);
});

test('plain completions', async () => {
  const request = { model: 'tiny', prompt: 'The quick brown', max_tokens: 6, temperature: 0 };
  const whole = await client.completions.create({ ...request, echo: true, logprobs: 1 });
  const chunks = await Array.fromAsync(await client.completions.create({ ...request, stream: true }));
  assert.equal(whole.choices[0].text, request.prompt + chunks.map((chunk) => chunk.choices[0].text).join(''));
  assert.equal(whole.choices[0].logprobs.tokens.length, whole.usage.total_tokens);
});

test('models', async () => {
  const models = await Array.fromAsync(client.models.list());
  assert.deepEqual(models.map((model) => model.id).sort(), ['poet', 'sight', 'tiny']);
  assert.equal((await client.models.retrieve('poet')).parent, 'tiny');
});

test('headers beside the answer', async () => {
  const headers = { 'x-request-id': 'mine-2' };
  const request = client.chat.completions.create({ ...questions.text, ...greedy }, { headers });
  const { data, response, request_id } = await request.withResponse();
  assert.equal(response.status, 200);
  assert.equal(request_id, 'mine-2');
  assert.equal(data.object, 'chat.completion');
});

for (const stream of [false, true]) {
  test(`mistakes are errors of the client, stream: ${stream}`, async () => {
    const unknown = client.chat.completions.create({ ...questions.text, model: 'nobody', stream });
    await assert.rejects(unknown, (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.deepEqual([error.code, error.param], ['model_not_found', 'model']);
      assert.ok(error.requestID);
      return true;
    });
    const hot = client.chat.completions.create({ ...questions.text, temperature: 9, stream });
    await assert.rejects(hot, (error) => error instanceof OpenAI.BadRequestError && error.param === 'temperature');
  });
}
