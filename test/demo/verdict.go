package main

import (
	"fmt"
	"io"
	"time"

	"github.com/meshca/meshca/test/mesh"
)

// result is what a run came to.
type result struct {
	ok, failed int64
	// rotations of each proxy, in the order of mesh.Sides.
	rotations [2]int64
	// handshakes that the client's proxy made.
	handshakes int64
	rejected   int64
	fault      string
	// elapsed is how long there was traffic.
	elapsed, ttl time.Duration
	// cut: something ended the run before its time, and an error says what. The rest cannot be judged then: what the
	// proxies said last is older than the last requests.
	cut bool
}

// due is how many rotations every proxy must have seen at least: the first comes no later than three quarters of a
// life after issue, the others every half of one. slack is for what comes late on a busy machine.
func due(elapsed, ttl time.Duration) int64 {
	const slack = 3 * time.Second
	first := ttl*3/4 + slack
	if elapsed < first {
		return 0
	}
	return 1 + int64((elapsed-first)/(ttl/2))
}

func (r result) total() int64 {
	var n int64
	for _, k := range r.rotations {
		n += k
	}
	return n
}

// faults says in a sentence each what went wrong; nothing where all went well.
func (r result) faults() []string {
	var out []string
	if r.failed > 0 {
		out = append(out, fmt.Sprintf("%d requests failed, the last one: %s", r.failed, r.fault))
	}
	if r.cut {
		return out
	}
	if r.ok == 0 {
		out = append(out, "no request was answered")
	}
	want := due(r.elapsed, r.ttl)
	for i, k := range r.rotations {
		if k < want {
			out = append(out, fmt.Sprintf("the %s rotated %d times in %s; with SVIDs of %s at least %d were due",
				mesh.Sides[i], k, r.elapsed.Round(time.Second), r.ttl, want))
		}
	}
	if r.handshakes < r.ok {
		out = append(out, fmt.Sprintf("%d requests were answered over %d handshakes: connections were kept, which would hide faults",
			r.ok, r.handshakes))
	}
	if r.rejected > 0 {
		out = append(out, fmt.Sprintf("Envoy rejected %d secrets", r.rejected))
	}
	return out
}

// print writes the summary. Its last line is for programs.
func (r result) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s of traffic, %d handshakes, SVIDs of %s", r.elapsed.Round(time.Second), r.handshakes, r.ttl)
	for i, k := range r.rotations {
		fmt.Fprintf(w, ", the %s rotated %d times", mesh.Sides[i], k)
	}
	fmt.Fprintln(w)
	for _, f := range r.faults() {
		fmt.Fprintln(w, "FAULT:", f)
	}
	fmt.Fprintf(w, "requests ok=%d failed=%d rotations=%d\n", r.ok, r.failed, r.total())
}
