// The Vercel AI SDK against the service: through its provider for servers like OpenAI's, which speaks chat
// completions, and through OpenAI's own, which speaks the Responses API.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateObject, generateText, isStepCount, Output, streamObject, streamText, tool } from 'ai';
import { baseURL, byHand, greedy, isWeather, picture, questions, room, Weather } from './support.js';

const provider = createOpenAICompatible({
  name: 'llama-adapter',
  baseURL,
  apiKey: 'none',
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: 'none' });
// Without `store: false` it refers to earlier items by their ids, as if the server kept them.
const stateless = { openai: { store: false, parallelToolCalls: false } };

// The same questions in the SDK's own form.
const text = { type: 'text', text: 'hello' };
const messages = {
  text: [{ role: 'user', content: 'hello' }],
  image: [{ role: 'user', content: [text, { type: 'file', mediaType: 'image/png', data: picture }] }],
};
const asked = Object.fromEntries(Object.entries(questions).flatMap(([kind, { model }]) => [
  [kind, { kind, model: provider(model), messages: messages[kind] }],
  [`${kind}, responses`, { kind, model: openai(model), messages: messages[kind], providerOptions: stateless }],
]));
const settings = { temperature: greedy.temperature, maxOutputTokens: greedy.max_tokens, maxRetries: 0 };
const roomy = { ...settings, maxOutputTokens: room.max_tokens };
const onError = ({ error }) => { throw error; };

const tools = {
  weather: tool({
    description: 'Get the weather of a city',
    inputSchema: Weather,
    execute: ({ city, days }) => `${days} days of rain in ${city}`,
  }),
};
// One call, then an answer to its result.
const agent = {
  tools,
  providerOptions: { llamaAdapter: { parallel_tool_calls: false }, ...stateless }, // each takes its own
  stopWhen: isStepCount(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'none' }),
};

function isACallAndAnAnswer([first, second, ...more], text) {
  assert.equal(more.length, 0);
  assert.equal(first.finishReason, 'tool-calls');
  assert.equal(first.toolCalls.length, 1);
  const [{ toolName, input }] = first.toolCalls;
  assert.equal(toolName, 'weather');
  isWeather(input);
  assert.equal(first.toolResults[0].output, `${input.days} days of rain in ${input.city}`);
  assert.deepEqual(second.toolCalls, []);
  assert.equal(text, second.text);
}

for (const [name, { kind, ...question }] of Object.entries(asked)) {
  test(`generateText, ${name}`, async () => {
    const answer = await generateText({ ...question, ...settings });
    assert.equal(answer.text, await byHand(questions[kind]));
    assert.ok(['stop', 'length'].includes(answer.finishReason));
    assert.equal(answer.usage.totalTokens, answer.usage.inputTokens + answer.usage.outputTokens);
    assert.equal(answer.response.modelId, questions[kind].model);
    assert.deepEqual(answer.toolCalls, []);
  });

  test(`streamText, ${name}`, async () => {
    const stream = streamText({ ...question, ...settings, onError });
    const pieces = await Array.fromAsync(stream.textStream);
    assert.equal(pieces.join(''), await byHand(questions[kind]));
    assert.ok(['stop', 'length'].includes(await stream.finishReason));
    assert.ok((await stream.usage).outputTokens > 0);
  });

  test(`generateObject and streamObject, ${name}`, async () => {
    const asked = { ...question, ...roomy, schema: Weather };
    const { object, finishReason } = await generateObject(asked);
    isWeather(object);
    assert.equal(finishReason, 'stop');
    const stream = streamObject({ ...asked, onError });
    const partial = await Array.fromAsync(stream.partialObjectStream);
    assert.deepEqual(await stream.object, object);
    assert.deepEqual(partial.at(-1), object);
  });

  test(`generateText with an output, ${name}`, async () => {
    const { output } = await generateText({ ...question, ...roomy, output: Output.object({ schema: Weather }) });
    isWeather(output);
  });

  test(`generateText with tools, ${name}`, async () => {
    const answer = await generateText({ ...question, ...roomy, ...agent });
    isACallAndAnAnswer(answer.steps, answer.text);
  });

  test(`streamText with tools, ${name}`, async () => {
    const stream = streamText({ ...question, ...roomy, ...agent, onError });
    await stream.consumeStream();
    isACallAndAnAnswer(await stream.steps, await stream.text);
  });
}

test('mistakes are errors that are not tried again', async () => {
  const unknown = generateText({ messages: messages.text, model: provider('nobody'), maxRetries: 0 });
  await assert.rejects(unknown, (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 404);
    assert.equal(error.isRetryable, false);
    assert.match(error.message, /nobody/);
    return true;
  });
});
