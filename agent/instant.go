package agent

import (
	"os"
	"strings"
	"time"
)

// instant is a moment by the clocks that outlive a process: the wall clock, which anyone may set, and the time since
// the machine booted, suspends included, which nobody can.
type instant struct {
	wall time.Time
	// boot names the boot that since counts from; it is empty where the machine does not tell.
	boot  string
	since time.Duration
}

// machineClocks returns what reads the machine's clocks.
func machineClocks() func() instant {
	boot := BootID()
	return func() instant {
		i := instant{wall: time.Now()}
		if since, ok := sinceBoot(); ok {
			i.boot, i.since = boot, since
		}
		return i
	}
}

// after is how long after earlier i is, by the clock that nobody can set; ok is false where they have none in common.
func (i instant) after(earlier instant) (d time.Duration, ok bool) {
	// A count that went back is another's: of a time namespace (time_namespaces(7)), or of a machine that was restored.
	if i.boot == "" || i.boot != earlier.boot || i.since < earlier.since {
		return 0, false
	}
	return i.since - earlier.since, true
}

// lived is how long after earlier i is, in one process. Its own clock stands still while the machine is suspended.
func (i instant) lived(earlier instant) time.Duration {
	d := i.wall.Sub(earlier.wall)
	if counted, ok := i.after(earlier); ok {
		d = max(d, counted)
	}
	return d
}

// BootID is random(4)'s name for this boot; empty where there is none.
func BootID() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}
