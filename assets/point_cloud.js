/* A cloud of points in two or three dimensions: one WebGL draw for all of them, a hundred thousand and more, however they are coloured; hover, click, drag, wheel
   and keys. Plotly's scattergl needs 'unsafe-eval', which the pages' content security policy does not give. Without WebGL a 2-D canvas draws fewer points. */
(function () {
    window.layerscope = window.layerscope || {};
    const VERTEX = `attribute vec3 at; attribute vec4 colour; uniform mat3 turn; uniform vec3 centre; uniform vec2 scale; uniform vec2 shift; uniform float size; uniform float deep;
        varying vec4 ink; void main() { vec3 p = turn * (at - centre); gl_Position = vec4(p.xy * scale + shift, -p.z * deep, 1.0); gl_PointSize = size * (1.0 + 0.35 * p.z * deep); ink = colour; }`;
    const FRAGMENT = `precision mediump float; varying vec4 ink; void main() { float r = length(gl_PointCoord - 0.5) * 2.0; float a = ink.a * (1.0 - smoothstep(0.75, 1.0, r));
        if (a < 0.02) discard; gl_FragColor = vec4(ink.rgb * a, a); }`;
    const REACH = 12;  // pixels from the pointer within which a point counts as meant
    let current = null;

    const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer;
    const KINDS = { f4: Float32Array, i4: Int32Array, u1: Uint8Array };
    const array = (packed) => new KINDS[packed.kind](bytes(packed.data));
    const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

    class Cloud {
        constructor(frame) {
            this.frame = frame;
            const layer = () => { const canvas = document.createElement("canvas"); canvas.className = "cloud-layer"; frame.appendChild(canvas); return canvas; };
            [this.under, this.points, this.over] = [layer(), layer(), layer()];
            this.tip = document.createElement("div");
            this.tip.className = "tip"; this.tip.hidden = true;
            frame.appendChild(this.tip);
            this.margins = { left: 58, right: 12, top: 10, bottom: 42 };
            this.overlay = {}; this.hovered = -1; this.n = 0; this.dims = 2; this.axes = ["", "", ""]; this.low = [0, 0, 0]; this.high = [1, 1, 1];
            this.colours = null;
            this.open();
            this.points.addEventListener("webglcontextlost", (event) => { event.preventDefault(); this.gl = null; });
            this.points.addEventListener("webglcontextrestored", () => { this.open(); this.upload(); this.draw(); });
            new ResizeObserver(() => this.resize()).observe(frame);
            this.listen();
            this.resize();
        }

        open() {
            const gl = this.points.getContext("webgl", { antialias: true, premultipliedAlpha: true, preserveDrawingBuffer: false });
            this.gl = gl;
            if (!gl) return;
            const program = gl.createProgram();
            for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
                const shader = gl.createShader(kind);
                gl.shaderSource(shader, source); gl.compileShader(shader); gl.attachShader(program, shader);
            }
            gl.linkProgram(program); gl.useProgram(program);
            this.uniform = Object.fromEntries(["turn", "centre", "scale", "shift", "size", "deep"].map((name) => [name, gl.getUniformLocation(program, name)]));
            this.buffer = { at: gl.createBuffer(), colour: gl.createBuffer() };
            for (const [name, width, kind, normal] of [["at", 3, gl.FLOAT, false], ["colour", 4, gl.UNSIGNED_BYTE, true]]) {
                const place = gl.getAttribLocation(program, name);
                gl.bindBuffer(gl.ARRAY_BUFFER, this.buffer[name]);
                gl.enableVertexAttribArray(place); gl.vertexAttribPointer(place, width, kind, normal, 0, 0);
            }
            gl.enable(gl.BLEND); gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
        }

        /** points: {key, dims, at, axes, texts, text, fields}; a new key means another projection, seen whole. */
        setPoints(points) {
            if (!points || points.key === this.key) return;
            Object.assign(this, { key: points.key, dims: points.dims, axes: points.axes, texts: points.texts, text: array(points.text), hovered: -1, told: -1 });
            this.fields = points.fields.map((field) => ({ ...field, values: array(field.values) }));
            const flat = array(points.at);
            this.n = flat.length / this.dims;
            this.at = new Float32Array(3 * this.n);
            this.low = [Infinity, Infinity, 0]; this.high = [-Infinity, -Infinity, 0];
            if (this.dims === 3) { this.low[2] = Infinity; this.high[2] = -Infinity; }
            for (let i = 0; i < this.n; i++) for (let a = 0; a < this.dims; a++) {
                const value = flat[i * this.dims + a];
                this.at[3 * i + a] = value;
                if (value < this.low[a]) this.low[a] = value;
                if (value > this.high[a]) this.high[a] = value;
            }
            this.centre = this.low.map((low, a) => (low + this.high[a]) / 2);
            this.uploadAt = true; this.colours = null;
            this.reset();
        }

        /** colours: {values (a palette number a point), palette, size, opacity, legend}. */
        setColours(colours) {
            if (!colours || !this.n) return;
            const values = array(colours.values);
            if (values.length !== this.n) return;
            const inks = colours.palette.map((hex) => (hex ? [...rgb(hex), 255] : [0, 0, 0, 0]));
            this.rgba = new Uint8Array(4 * this.n);
            const alpha = Math.round(255 * colours.opacity);
            for (let i = 0; i < this.n; i++) { const ink = inks[values[i]]; this.rgba.set([ink[0], ink[1], ink[2], ink[3] ? alpha : 0], 4 * i); }
            this.colours = { ...colours, number: values };
            this.uploadColours = true;
        }

        setOverlay(overlay) {
            if (!overlay || overlay.key !== this.key) { this.overlay = {}; return; }
            const zoom = overlay.zoom && overlay.zoom.length && overlay.at !== this.overlay.at ? overlay.zoom : null;
            this.overlay = overlay;
            if (zoom) this.bring(zoom);
        }

        upload() { this.uploadAt = this.uploadColours = true; }

        // -- the view: turn (3 x 3), pixels per unit, where the centre stands ------------------------------------------------------------

        reset() {
            this.turn = this.dims === 3 ? turned(-0.6, 0.4) : [1, 0, 0, 0, 1, 0, 0, 0, 1];
            [this.yaw, this.pitch] = [-0.6, 0.4];
            this.fit(this.low, this.high);
        }

        fit(low, high) {
            const { left, right, top, bottom } = this.margins;
            const [w, h] = [Math.max(this.width - left - right, 50), Math.max(this.height - top - bottom, 50)];
            const reach = high.map((value, a) => Math.max(value - low[a], 1e-9));
            const span = this.dims === 3 ? Math.hypot(...reach) : 0;
            this.k = 0.94 * (this.dims === 3 ? (1.2 * Math.min(w, h)) / span : Math.min(w / reach[0], h / reach[1]));
            const middle = low.map((value, a) => (value + high[a]) / 2 - this.centre[a]);
            const [x, y] = rotate(this.turn, middle);
            [this.ox, this.oy] = [left + w / 2 - this.k * x, top + h / 2 + this.k * y];
        }

        /** Zoom to some points, with room around them. */
        bring(numbers) {
            const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
            for (const i of numbers) for (let a = 0; a < 3; a++) { low[a] = Math.min(low[a], this.at[3 * i + a]); high[a] = Math.max(high[a], this.at[3 * i + a]); }
            const least = Math.max(...this.high.map((value, a) => value - this.low[a])) / 10;
            for (let a = 0; a < this.dims; a++) { const more = Math.max((least - (high[a] - low[a])) / 2, 0) + 0.15 * (high[a] - low[a]); low[a] -= more; high[a] += more; }
            this.fit(low, high);
        }

        place(i) { return this.project3([this.at[3 * i], this.at[3 * i + 1], this.at[3 * i + 2]]); }
        project3(p) { const [x, y] = rotate(this.turn, [p[0] - this.centre[0], p[1] - this.centre[1], p[2] - this.centre[2]]); return [this.ox + this.k * x, this.oy - this.k * y]; }
        project2(x, y) { return [this.ox + this.k * (x - this.centre[0]), this.oy - this.k * (y - this.centre[1])]; }
        unproject(px, py) { return [this.centre[0] + (px - this.ox) / this.k, this.centre[1] - (py - this.oy) / this.k]; }
        /** Whether a place is inside the plotting area. */
        inside(x, y) { const [l, t, w, h] = this.area(); return x >= l && y >= t && x <= l + w && y <= t + h; }
        area() { const { left, right, top, bottom } = this.dims === 3 ? { left: 0, right: 0, top: 0, bottom: 0 } : this.margins; return [left, top, this.width - left - right, this.height - top - bottom]; }
        label(i) { return this.texts[this.text[i]] ?? ""; }

        /** The point nearest to a place on the screen, -1 if none is near; points that are not drawn are not meant. */
        pick(px, py) {
            const [a, b, c, d, e, f] = this.turn, { k, at, n } = this, [cx, cy, cz] = this.centre || [0, 0, 0];
            let best = REACH * REACH, found = -1;
            if (!this.inside(px, py)) return found;
            for (let i = 0, j = 0; i < n; i++, j += 3) {
                const x = at[j] - cx, y = at[j + 1] - cy, z = at[j + 2] - cz;
                const dx = this.ox + k * (a * x + b * y + c * z) - px, dy = this.oy - k * (d * x + e * y + f * z) - py;
                const far = dx * dx + dy * dy;
                if (far < best && this.rgba && this.rgba[4 * i + 3]) { best = far; found = i; }
            }
            return found;
        }

        // -- drawing -----------------------------------------------------------------------------------------------------------------------

        resize() {
            const { clientWidth: w, clientHeight: h } = this.frame;
            if (!w || !h || (w === this.width && h === this.height)) return;
            [this.width, this.height, this.dpr] = [w, h, window.devicePixelRatio || 1];
            for (const canvas of [this.under, this.points, this.over]) { canvas.width = Math.round(w * this.dpr); canvas.height = Math.round(h * this.dpr); }
            if (this.n) this.reset();
            this.draw();
        }

        later() { if (!this.waiting) { this.waiting = true; requestAnimationFrame(() => { this.waiting = false; this.draw(); }); } }

        clean(canvas) { const context = canvas.getContext("2d"); context.setTransform(this.dpr, 0, 0, this.dpr, 0, 0); context.clearRect(0, 0, this.width, this.height); return context; }

        draw() {
            if (!this.width) return;
            const { CanvasPen, furniture, above } = window.layerscope.cloudPens;
            this.theme = { line: style("--line"), edge: style("--line-strong"), quiet: style("--ink-3"), soft: style("--ink-2"), strong: style("--ink"), accent: style("--accent"), surface: style("--surface") };
            const under = new CanvasPen(this.clean(this.under)), over = new CanvasPen(this.clean(this.over));
            if (!this.n) { this.drawPoints(); return; }
            furniture(under, this);
            this.drawPoints();
            above(over, this);
        }

        drawPoints() {
            if (!this.gl) {
                const pen = new window.layerscope.cloudPens.CanvasPen(this.clean(this.gl === null && this.plain ? this.plain : (this.plain = this.replaced())));
                if (this.n && this.colours) this.dots(pen);
                return;
            }
            const gl = this.gl;
            gl.viewport(0, 0, this.points.width, this.points.height);
            gl.disable(gl.SCISSOR_TEST);
            gl.clearColor(0, 0, 0, 0); gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
            const [l, t0, w, h] = this.area().map((value) => value * this.dpr);
            gl.enable(gl.SCISSOR_TEST); gl.scissor(l, this.points.height - t0 - h, w, h);
            if (!this.n || !this.colours) return;
            if (this.uploadAt) { gl.bindBuffer(gl.ARRAY_BUFFER, this.buffer.at); gl.bufferData(gl.ARRAY_BUFFER, this.at, gl.STATIC_DRAW); this.uploadAt = false; }
            if (this.uploadColours) { gl.bindBuffer(gl.ARRAY_BUFFER, this.buffer.colour); gl.bufferData(gl.ARRAY_BUFFER, this.rgba, gl.STATIC_DRAW); this.uploadColours = false; }
            const t = this.turn, deep = this.dims === 3 ? 1 / Math.hypot(...this.high.map((value, a) => value - this.low[a])) : 0;
            if (deep) gl.enable(gl.DEPTH_TEST); else gl.disable(gl.DEPTH_TEST);
            gl.uniformMatrix3fv(this.uniform.turn, false, [t[0], t[3], t[6], t[1], t[4], t[7], t[2], t[5], t[8]]);
            gl.uniform3fv(this.uniform.centre, this.centre);
            gl.uniform2f(this.uniform.scale, (2 * this.k) / this.width, (2 * this.k) / this.height);
            gl.uniform2f(this.uniform.shift, (2 * this.ox) / this.width - 1, 1 - (2 * this.oy) / this.height);
            gl.uniform1f(this.uniform.size, this.colours.size * this.dpr * this.grown());
            gl.uniform1f(this.uniform.deep, deep);
            gl.drawArrays(gl.POINTS, 0, this.n);
        }

        /** Points grow as one comes nearer, slowly. */
        grown() { const whole = 0.94 * Math.min(this.width / Math.max(this.high[0] - this.low[0], 1e-9), this.height / Math.max(this.high[1] - this.low[1], 1e-9)); return Math.min(Math.max((this.k / whole) ** 0.3, 1), 3); }

        /** A canvas that gave WebGL once gives nothing else: another one takes its place. */
        replaced() { const canvas = this.points.cloneNode(); this.points.replaceWith(canvas); this.points = canvas; return canvas; }

        dots(pen) {
            const r = (this.colours.size * this.grown()) / 2;
            for (let i = 0; i < this.n; i++) {
                const hex = this.colours.palette[this.colours.number[i]];
                if (!hex) continue;
                const [x, y] = this.place(i);
                if (this.inside(x, y)) pen.circle(x, y, r, hex, null, 0, this.colours.opacity);
            }
        }

        // -- pointer and keys ----------------------------------------------------------------------------------------------------------------

        listen() {
            const frame = this.frame;
            const at = (event) => { const box = frame.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
            frame.addEventListener("pointerdown", (event) => {
                if (event.button || event.target.closest(".tip")) return;
                frame.setPointerCapture(event.pointerId);
                this.grip = { from: at(event), last: at(event), moved: false, pan: this.dims === 2 || event.shiftKey };
                frame.focus({ preventScroll: true });
            });
            frame.addEventListener("pointermove", (event) => {
                const [x, y] = at(event), grip = this.grip;
                if (!grip) return this.hover(x, y);
                const [dx, dy] = [x - grip.last[0], y - grip.last[1]];
                grip.moved = grip.moved || Math.hypot(x - grip.from[0], y - grip.from[1]) > 4;
                if (!grip.moved) return undefined;
                grip.last = [x, y];
                if (grip.pan) { this.ox += dx; this.oy += dy; } else this.rotate(dx / 150, dy / 150);
                this.tip.hidden = true;
                return this.later();
            });
            frame.addEventListener("pointerup", (event) => {
                const grip = this.grip;
                this.grip = null;
                if (!grip || grip.moved) return;
                const found = this.pick(...at(event));
                if (found >= 0) window.dash_clientside.set_props("emb-clicked", { data: { i: found, key: this.key, at: Date.now() } });
            });
            frame.addEventListener("pointerleave", () => { this.hovered = -1; this.tip.hidden = true; this.later(); });
            frame.addEventListener("dblclick", () => { this.reset(); this.later(); });
            // A wheel over the picture scrolls the page until the picture was clicked.
            frame.addEventListener("wheel", (event) => {
                if (document.activeElement !== frame && !event.ctrlKey && !event.metaKey) return;
                event.preventDefault();
                this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...at(event));
            }, { passive: false });
            frame.addEventListener("keydown", (event) => {
                const step = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
                if (step && this.dims === 3) this.rotate(-step[0] * 0.12, -step[1] * 0.12);
                else if (step) { this.ox += step[0] * 50; this.oy += step[1] * 50; }
                else if (event.key === "+" || event.key === "=") this.zoom(1.3, this.width / 2, this.height / 2);
                else if (event.key === "-") this.zoom(1 / 1.3, this.width / 2, this.height / 2);
                else if (event.key === "0") this.reset();
                else return;
                event.preventDefault();
                this.later();
            });
        }

        zoom(factor, x, y) { this.k *= factor; this.ox = x + (this.ox - x) * factor; this.oy = y + (this.oy - y) * factor; this.later(); }

        rotate(yaw, pitch) {
            const middle = [this.margins.left + (this.width - this.margins.left - this.margins.right) / 2, this.margins.top + (this.height - this.margins.top - this.margins.bottom) / 2];
            [this.ox, this.oy] = middle;
            this.yaw += yaw; this.pitch = Math.min(Math.max(this.pitch + pitch, -1.57), 1.57);
            this.turn = turned(this.yaw, this.pitch);
            this.later();
        }

        hover(x, y) {
            const found = this.n ? this.pick(x, y) : -1;
            if (found !== this.hovered) { this.hovered = found; this.later(); }
            this.tip.hidden = found < 0;
            if (found < 0) return;
            if (this.told !== found) this.tell(found);
            const box = this.frame.getBoundingClientRect(), { offsetWidth: w, offsetHeight: h } = this.tip;
            this.tip.style.left = `${box.left + (x + 18 + w > this.width ? x - w - 14 : x + 16)}px`;
            this.tip.style.top = `${Math.min(box.top + y + 14, window.innerHeight - h - 8)}px`;
        }

        tell(i) {
            this.told = i;
            const name = document.createElement("b");
            name.textContent = this.label(i);
            const lines = this.fields.map((field) => { const line = document.createElement("div"); line.textContent = `${field.name} ${this.value(field, i)}`; return line; });
            this.tip.replaceChildren(name, ...lines);
        }

        value(field, i) {
            const value = field.values[i];
            if (field.words) return field.words[value] ?? "";
            return Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(4));
        }
    }

    const rotate = (m, [x, y, z]) => [m[0] * x + m[1] * y + m[2] * z, m[3] * x + m[4] * y + m[5] * z, m[6] * x + m[7] * y + m[8] * z];
    /** The third axis stands up; yaw turns around it, pitch tips it towards the reader. */
    function turned(yaw, pitch) {
        const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
        return [cy, -sy, 0, sy * sp, cy * sp, cp, -sy * cp, -cy * cp, sp];
    }

    document.addEventListener("click", (event) => {
        const tool = event.target.closest("[data-cloud]");
        if (!tool || !current) return;
        if (tool.dataset.cloud === "reset") { current.reset(); current.draw(); } else window.layerscope.saveCloud(current, tool.dataset.cloud, tool.dataset.name);
    });

    window.dash_clientside = window.dash_clientside || {};
    window.dash_clientside.layerscope = Object.assign(window.dash_clientside.layerscope || {}, {
        hasWebgl() { const canvas = document.createElement("canvas"); const gl = canvas.getContext("webgl"); gl?.getExtension("WEBGL_lose_context")?.loseContext(); return Boolean(gl); },

        /** Draws what the three stores say; gives what was drawn, for the line under the picture and for tests. */
        drawCloud(points, colours, overlay) {
            const frame = document.getElementById("emb-cloud");
            if (!frame) return window.dash_clientside.no_update;
            if (!current || current.frame !== frame) {
                current?.gl?.getExtension("WEBGL_lose_context")?.loseContext();
                current = window.layerscope.cloud = new Cloud(frame);
            }
            if (!points) { Object.assign(current, { key: null, n: 0, colours: null, overlay: {} }); current.draw(); return { n: 0 }; }
            current.setPoints(points);
            if (colours && colours.key === points.key) current.setColours(colours);
            current.setOverlay(overlay);
            current.draw();
            return { n: current.n, key: current.key, webgl: Boolean(current.gl), coloured: Boolean(current.colours), at: Date.now() };
        },
    });
})();
