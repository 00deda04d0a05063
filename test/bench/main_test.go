package main

import (
	"strings"
	"testing"
)

func TestParseAndJudge(t *testing.T) {
	figures, err := parse(strings.NewReader(`goos: linux
BenchmarkIssueOneCSRACall-2   1   5600 floor/s   0.8500 of-floor   4760 svids/s   12 ns/op
BenchmarkPush-2   1   1.2 memory-ratio
PASS
`))
	if err != nil {
		t.Fatal(err)
	}
	met := map[string]string{}
	for _, f := range figures {
		met[f.Metric] = "no target"
		if f.Met != nil {
			met[f.Metric] = map[bool]string{true: "met", false: "missed"}[*f.Met]
		}
	}
	want := map[string]string{"floor/s": "no target", "of-floor": "met", "svids/s": "no target", "memory-ratio": "missed"}
	if len(met) != len(want) {
		t.Errorf("got %v", met)
	}
	for metric, w := range want {
		if met[metric] != w {
			t.Errorf("%s: %s, want %s", metric, met[metric], w)
		}
	}
	if _, err := parse(strings.NewReader("PASS\n")); err == nil {
		t.Error("a run without figures passed for one")
	}
	if _, err := parse(strings.NewReader("BenchmarkX 1 many y/s\n")); err == nil {
		t.Error("a value that is no number passed")
	}
}
