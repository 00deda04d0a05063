package main

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// A step that is over is told by what the rollout had in it, whatever was ordered since. Where nobody kept that, nothing is
// said of it.
func TestPassageSays(t *testing.T) {
	type had = meshcav1.RolloutPassage_Had
	end := timestamppb.New(time.Unix(946688400, 0))
	tainted := func(r *meshcav1.RolloutStatus) {
		r.Within, r.NewShare, r.BundleSequence, r.LastEnd = durationpb.New(time.Minute), 100, 6, nil
	}
	aborted := func(r *meshcav1.RolloutStatus) { r.Aborted, r.AbortedBy, r.LastEnd = true, "uid 7", nil }
	ended := func(r *meshcav1.RolloutStatus) { r.LastEnd, r.Canary, r.Despite = end, 5, []string{"spiffe://d/n2"} }
	for name, c := range map[string]struct {
		step    string
		aborted bool
		had     *had
		now     func(*meshcav1.RolloutStatus)
		want    string
	}{
		"published, and again":       {"published", false, &had{BundleSequence: 4}, tainted, "bbbbbbbbbbbb is in trust bundle 4, and signs for nobody before all who count have that"},
		"confirmed, then tainted":    {"confirmed", false, &had{BundleSequence: 4}, tainted, "all who count trust bbbbbbbbbbbb; it signs as soon as it has an intermediate"},
		"confirmed in an emergency":  {"confirmed", false, &had{BundleSequence: 4, Within: durationpb.New(time.Minute)}, tainted, "confirmations are waited for no longer; bbbbbbbbbbbb signs as soon as it has an intermediate"},
		"some given up":              {"confirmed", false, &had{BundleSequence: 4, GivenUp: true}, ended, "confirmations are waited for no longer; bbbbbbbbbbbb signs as soon as it has an intermediate"},
		"all before some given up":   {"confirmed", false, &had{BundleSequence: 4}, ended, "all who count trust bbbbbbbbbbbb; it signs as soon as it has an intermediate"},
		"a canary, then tainted":     {"canary", false, &had{BundleSequence: 4, NewShare: 5}, tainted, "bbbbbbbbbbbb signs for 5 % of the identities, and for all when an operator says so"},
		"retired, then tainted":      {"retired", false, &had{BundleSequence: 4, LastEnd: end}, tainted, "bbbbbbbbbbbb signs for all; aaaaaaaaaaaa is trusted until the last certificate under it has ended"},
		"retired, then aborted":      {"retired", false, &had{BundleSequence: 4, LastEnd: end}, aborted, "bbbbbbbbbbbb signs for all; aaaaaaaaaaaa is trusted until the last certificate under it has ended"},
		"retired, nothing lived":     {"retired", false, &had{BundleSequence: 4}, ended, "bbbbbbbbbbbb signs for all; nothing lives under aaaaaaaaaaaa, and it leaves the trust bundle"},
		"retired in an emergency":    {"retired", false, &had{BundleSequence: 4, LastEnd: end, Within: durationpb.New(time.Minute)}, aborted, "bbbbbbbbbbbb signs for all, and SVIDs are renewed under it; aaaaaaaaaaaa leaves the trust bundle soon, whatever still lives under it"},
		"aborted, then tainted":      {"retired", true, &had{AbortedBy: "uid 8", LastEnd: end}, tainted, "aaaaaaaaaaaa signs for all; bbbbbbbbbbbb is trusted until the last certificate under it has ended"},
		"aborted and spared":         {"retired", true, &had{AbortedBy: "uid 8", LastEnd: end, Spared: true}, tainted, "aaaaaaaaaaaa signs for all; bbbbbbbbbbbb was trusted before, and stays in the trust bundle when the last certificate of this rollout has ended"},
		"older: published":           {"published", false, nil, tainted, "bbbbbbbbbbbb is in the trust bundle, and signs for nobody before all who count have that"},
		"older: confirmed":           {"confirmed", false, nil, tainted, "bbbbbbbbbbbb signs as soon as it has an intermediate"},
		"older: confirmed, aborted":  {"confirmed", true, nil, aborted, "aaaaaaaaaaaa is trusted still; it signs for all as soon as it has an intermediate"},
		"older: a canary":            {"canary", false, nil, ended, "bbbbbbbbbbbb signs for a share of the identities, and for all when an operator says so"},
		"older: signing":             {"signing", false, nil, ended, "bbbbbbbbbbbb signs for all; what aaaaaaaaaaaa has begun is being finished"},
		"older: retired":             {"retired", false, nil, tainted, "bbbbbbbbbbbb signs for all, and aaaaaaaaaaaa for nobody any more"},
		"older: retired and aborted": {"retired", true, nil, aborted, "aaaaaaaaaaaa signs for all, and bbbbbbbbbbbb for nobody any more"},
	} {
		r := rolled("out", c.now).GetRollout()
		want := c.step + ": " + c.want
		switch {
		case c.aborted && c.had != nil:
			want = "aborted by uid 8, " + want
		case c.aborted:
			want = "aborted by uid 7, " + want
		}
		if got := passageSays(r, &meshcav1.RolloutPassage{Step: c.step, Aborted: c.aborted, Had: c.had}); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}
