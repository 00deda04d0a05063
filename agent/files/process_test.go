package files

import (
	"fmt"
	"testing"
	"time"
)

// A process that began within this very tick has run for no time, never for less: with less it would count as one whose
// age nobody knows, and be signalled at once.
func TestAgeOfAProcessThatJustBegan(t *testing.T) {
	for tick := range int64(20_000) {
		began := 7_000_000 + tick
		stat := fmt.Appendf(nil, "42 (a ) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 %d 20 21", began)
		for _, later := range []int64{0, 1, 299} {
			up := fmt.Appendf(nil, "%d.%02d 123.45\n", (began+later)/100, (began+later)%100)
			if got, err := ageOf(stat, up); err != nil || got != time.Duration(later)*10*time.Millisecond {
				t.Fatalf("begun at tick %d, %d ticks later: %v, %v", began, later, got, err)
			}
		}
	}
}

func TestAgeOfNothing(t *testing.T) {
	for stat, up := range map[string]string{
		"":                             "1.00 1.00",
		"42 (sleep) S 1":               "1.00 1.00",
		statAt("x"):                    "1.00 1.00",
		statAt("5"):                    "1",
		statAt("6"):                    "",
		statAt("7"):                    "a.bc 1.00",
		statAt("8"):                    "1.0 1.00",
		statAt("99999999999999999999"): "1.00 1.00",
	} {
		if got, err := ageOf([]byte(stat), []byte(up)); err == nil {
			t.Errorf("%q, %q: %v", stat, up, got)
		}
	}
}

func statAt(start string) string {
	return "42 (sleep) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 " + start + " 20"
}

func TestStatus(t *testing.T) {
	const before, after = "Name:\tnginx\nUmask:\t0022\nPid:\t42\nPPid:\t7\nUid:\t33\t0\t0\t0\n", "NSpgid:\t42\nCapEff:\t0000000000000000\n"
	for line, depth := range map[string]int{
		"NStgid:\t42\nNSpid:\t42\n":             1,
		"NStgid:\t42\t5\nNSpid:\t42\t5\n":       2, // a container's
		"NStgid:\t42\t5\t1\nNSpid:\t42\t5\t1\n": 3, // and one's in it
		"":                                      0, // gVisor, WSL 1
	} {
		want := process{name: "nginx", parent: 7, uid: 33, depth: depth}
		if p, err := parseStatus([]byte(before + line + after)); err != nil || p != want {
			t.Errorf("%q: %+v, %v", line, p, err)
		}
	}
	if p, err := parseStatus([]byte("Name:\tnginx\nPPid:\tx\n")); err == nil {
		t.Errorf("of no parent: %+v", p)
	}
}
