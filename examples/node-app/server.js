// A small service on port 8080 with a health endpoint.
const http = require("node:http");

const port = Number(process.env.PORT || 8080);

http
  .createServer((request, response) => {
    const found = request.url === "/" || request.url === "/health";
    response.writeHead(found ? 200 : 404, { "content-type": "application/json" });
    response.end(JSON.stringify(found ? { status: "ok" } : { error: "not found" }) + "\n");
  })
  .listen(port, () => console.log(`listening on port ${port}`));
