package bolt

import (
	"bytes"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/meshca/meshca/ca"
)

func TestGroupRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var group []ca.LedgerEntry
		var last time.Time
		for range rapid.IntRange(1, 20).Draw(t, "size") {
			e := ca.LedgerEntry{
				Serial:         rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "serial"),
				ID:             rapid.String().Draw(t, "id"),
				Profile:        rapid.String().Draw(t, "profile"),
				AuthorityKeyID: rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "akid"),
				TBSDigest:      rapid.SliceOfN(rapid.Byte(), 0, 32).Draw(t, "digest"),
				Evidence:       rapid.SliceOf(rapid.Byte()).Draw(t, "evidence"),
				IssuedAt:       time.Unix(0, rapid.Int64().Draw(t, "issued")).UTC(),
				NotAfter:       time.Unix(rapid.Int64Range(0, 1<<40).Draw(t, "end"), 0).UTC(),
			}
			if e.NotAfter.After(last) {
				last = e.NotAfter
			}
			group = append(group, e)
		}
		first := rapid.Uint64Range(1, 1<<60).Draw(t, "first")
		value := encodeGroup(group)
		got, err := readGroup(first, value)
		if err != nil || len(got) != len(group) {
			t.Fatalf("%d of %d, %v", len(got), len(group), err)
		}
		for i, e := range group {
			g := got[i]
			if g.Index != first+uint64(i) || !bytes.Equal(g.Serial, e.Serial) || g.ID != e.ID || g.Profile != e.Profile ||
				!bytes.Equal(g.AuthorityKeyID, e.AuthorityKeyID) || !bytes.Equal(g.TBSDigest, e.TBSDigest) ||
				!bytes.Equal(g.Evidence, e.Evidence) || !g.IssuedAt.Equal(e.IssuedAt) || !g.NotAfter.Equal(e.NotAfter) {
				t.Fatalf("%+v, want %+v", g, e)
			}
		}
		if end, err := groupEnd(value); err != nil || end.Unix() != max(last.Unix(), 0) {
			t.Fatalf("the group ends at %s, want %s: %v", end, last, err)
		}
		// Cut anywhere, it is an error and never half a group.
		cut := rapid.IntRange(0, len(value)-1).Draw(t, "cut")
		if _, err := readGroup(first, value[:cut]); err == nil {
			t.Fatalf("a group cut at %d of %d is read", cut, len(value))
		}
	})
}

func FuzzReadGroup(f *testing.F) {
	f.Add(encodeGroup([]ca.LedgerEntry{{ID: "a", Evidence: []byte("{}")}}))
	f.Add([]byte{groupVersion, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, value []byte) {
		group, err := readGroup(1, value)
		if err != nil {
			return
		}
		// What can be read can be written again and says the same.
		again, err := readGroup(1, encodeGroup(group))
		if err != nil || len(again) != len(group) {
			t.Fatalf("%d of %d, %v", len(again), len(group), err)
		}
	})
}
