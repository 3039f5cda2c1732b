// `npm test`: asks the running service, as an integration test would.
const http = require("node:http");

const port = Number(process.env.PORT || 8080);

http
  .get({ host: "127.0.0.1", port, path: "/health" }, (response) => {
    const passed = response.statusCode === 200;
    console.log(passed ? "1 test passed" : `health answered ${response.statusCode}`);
    process.exitCode = passed ? 0 : 1;
    response.resume();
  })
  .on("error", (error) => {
    console.error(`the service does not answer: ${error.message}`);
    process.exitCode = 1;
  });
