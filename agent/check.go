package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

const (
	// skewWarns and skewErrs: certificates are dated back a minute, and tokens are judged by the second.
	skewWarns = 10 * time.Second
	skewErrs  = time.Minute
	// probeTimeout bounds the connection that a check makes.
	probeTimeout = 5 * time.Second
)

// findings collects what a check found.
type findings struct{ list []*meshcav1.Finding }

func (f *findings) ok(subject, format string, args ...any) {
	f.add(meshcav1.Finding_LEVEL_OK, subject, fmt.Sprintf(format, args...), "")
}

func (f *findings) warn(subject, hint, format string, args ...any) {
	f.add(meshcav1.Finding_LEVEL_WARNING, subject, fmt.Sprintf(format, args...), hint)
}

func (f *findings) fail(subject, hint, format string, args ...any) {
	f.add(meshcav1.Finding_LEVEL_ERROR, subject, fmt.Sprintf(format, args...), hint)
}

// refused adds an error with the hint that its reason has.
func (f *findings) refused(subject string, err error) {
	hint := refusal.Of(err).Do()
	f.add(meshcav1.Finding_LEVEL_ERROR, subject, err.Error(), hint)
}

func (f *findings) add(level meshcav1.Finding_Level, subject, detail, hint string) {
	f.list = append(f.list, &meshcav1.Finding{Subject: subject, Level: level, Detail: detail, Hint: hint})
}

// check looks at everything that the agent rests on: the CA, clocks, its own SVID, files and their permissions, and
// each workload. What is well with workloads is one finding, what is not is one each.
func (a *Agent) check(ctx context.Context) []*meshcav1.Finding {
	f := &findings{}
	trusted := a.checkServer(ctx, f)
	a.checkClock(f)
	a.checkBundle(f, trusted)
	a.checkSelf(f)
	checkTokenFile(f, "the agent's token", a.config.TokenFile)
	a.checkDirs(f)
	a.checkDenials(f)
	a.checkSources(f)
	a.checkWorkloads(f)
	a.checkDeliveries(f)
	return f.list
}

// checkServer reports whether nothing answers at the CA's address that the bundle refuses.
func (a *Agent) checkServer(ctx context.Context, f *findings) (trusted bool) {
	const subject = "CA"
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	err := a.client.Probe(ctx)
	connected, last, _, _ := a.follower.standing()
	switch {
	case err != nil && refusal.Of(err) == refusal.CAUntrusted && mentionsTime(err):
		f.fail(subject, "Compare the clocks of this node and of the CA first; then `certctl bundle show` here (--agent) and at the CA.", "%v", err)
	case err != nil:
		f.refused(subject, err)
	case !connected && last != nil:
		f.warn(subject, refusal.Of(last).Do(), "%s answers and proves to be the CA, but the stream from it is not open: %v", a.config.Server, last)
	case !connected:
		f.warn(subject, "Look again in a few seconds.", "%s answers and proves to be the CA; the stream from it is not open yet", a.config.Server)
	default:
		f.ok(subject, "%s answers, proves to be the CA, and the stream from it is open", a.config.Server)
	}
	return refusal.Of(err) != refusal.CAUntrusted
}

// mentionsTime reports whether a verification failed by a clock.
func mentionsTime(err error) bool {
	return strings.Contains(err.Error(), "expired") || strings.Contains(err.Error(), "not yet valid")
}

func (a *Agent) checkClock(f *findings) {
	const subject = "clock"
	const hint = "Let both follow the same time source (chrony, systemd-timesyncd): tokens and certificates are judged by clocks."
	skew, measured := a.clock.offset()
	switch {
	case !measured:
		f.warn(subject, "It is measured with the first answer of the CA.", "the CA's clock has not been seen yet")
	case skew.Abs() >= skewErrs:
		f.fail(subject, hint, "the CA's clock minus this node's is %v", skew.Round(time.Millisecond))
	case skew.Abs() >= skewWarns:
		f.warn(subject, hint, "the CA's clock minus this node's is %v", skew.Round(time.Millisecond))
	default:
		f.ok(subject, "the CA's clock minus this node's is %v", skew.Round(time.Millisecond))
	}
}

func (a *Agent) checkBundle(f *findings, trusted bool) {
	const subject = "trust bundle"
	held := a.trust.current.Value()
	fileErr, keptErr := a.trust.faults()
	fileHas, outranked := a.trust.outranked()
	switch {
	case len(held.X509Authorities()) == 0:
		f.fail(subject, "Put the CA's bundle there: `certctl bundle export` writes it.", "none is held, and %s brought none: %v", a.config.BundleFile, fileErr)
		return
	case fileErr != nil:
		f.warn(subject, "After a loss of the state directory the agent would not know the CA. `certctl bundle export` writes the file.", "the bundle file cannot be used: %v", fileErr)
	case !trusted && outranked:
		f.fail(subject, fmt.Sprintf("If the CA was made anew, and the file is its own, `certctl ca accept-rollback --above %d` at the CA makes its bundle the newer one. "+
			"An old file is left alone: it could bring back a root that was given up.", a.trust.sequence()),
			"the bundle file has a root that is not trusted, and is not taken: its sequence is %d, and %d is held", fileHas, a.trust.sequence())
	default:
		f.ok(subject, "sequence %d with %d roots", a.trust.sequence(), len(held.X509Authorities()))
	}
	if keptErr != nil {
		f.fail(subject, "Look at the space and the permissions of "+a.config.StateDir+".", "it cannot be kept for a restart: %v", keptErr)
	}
	if mode, err := a.trust.fileMode(); err == nil && mode.Perm()&0o022 != 0 {
		f.fail(subject, "Only the CA and root may write it: `chmod go-w "+a.config.BundleFile+"`.", "whoever can write %s (mode %v) decides which CA is trusted", a.config.BundleFile, mode)
	}
	for _, root := range held.X509Authorities() {
		if left := time.Until(root.NotAfter); left < 30*24*time.Hour {
			f.warn(subject, "Plan the change of the root.", "root %s ends in %v", root.Subject, left.Round(time.Hour))
		}
	}
}

func (a *Agent) checkSelf(f *findings) {
	const subject = "the agent's SVID"
	h := a.self.identity.Value()
	err, _ := a.self.lastError()
	switch {
	case h == nil || h.ended(a.config.now()):
		if err == nil {
			err = refusal.New(refusal.SVIDPending, "the first attempt has not been answered")
		}
		f.refused(subject, fmt.Errorf("there is none: %w", err))
	case err != nil:
		f.warn(subject, refusal.Of(err).Do(), "%s ends in %v and its renewal fails: %v", h.svid.ID, left(h, a.config.now()), err)
	default:
		f.ok(subject, "%s ends in %v", h.svid.ID, left(h, a.config.now()))
	}
}

func left(h *held, now instant) time.Duration { return h.left(now).Round(time.Second) }

// checkTokenFile looks at the file and at what the token says of its own end; nothing is verified here.
func checkTokenFile(f *findings, subject, path string) {
	t, err := readToken(path)
	if err != nil {
		f.refused(subject, err)
		return
	}
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o004 != 0 {
		f.warn(subject, "Take the permission away: `chmod o-r "+path+"`, or `defaultMode: 0400` in the pod's volume.", "everyone on this node can read %s (mode %v)", path, info.Mode())
	}
	end, ok := t.end()
	switch now := time.Now(); {
	case !ok:
		f.warn(subject, refusal.TokenMalformed.Do(), "%s holds something that does not read as a token", path)
	case !now.Before(end):
		f.fail(subject, refusal.TokenExpired.Do(), "the token in %s ended %v ago", path, now.Sub(end).Round(time.Second))
	default:
		f.ok(subject, "%s is readable, its token ends in %v", path, end.Sub(now).Round(time.Second))
	}
}

func (a *Agent) checkDirs(f *findings) {
	const subject = "directories"
	sound := true
	for _, d := range []struct {
		path  string
		loose fs.FileMode // bits that must not be set
		hint  string
	}{
		{a.config.RuntimeDir, 0o022, "chmod go-w "},
		{a.config.StateDir, 0o022, "chmod go-w "},
		{a.store.dir, 0o077, "chmod 0700 "},
	} {
		info, err := os.Stat(d.path)
		switch {
		case err != nil:
			sound = false
			f.fail(subject, "Restart the agent, which makes it.", "%v", err)
		case info.Mode().Perm()&d.loose != 0:
			sound = false
			f.fail(subject, "Run: "+d.hint+d.path, "%s has mode %v", d.path, info.Mode())
		}
	}
	entries, err := os.ReadDir(a.store.dir)
	if err != nil {
		return // told above
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().Perm()&0o077 != 0 {
			sound = false
			path := filepath.Join(a.store.dir, e.Name())
			f.fail(subject, "Remove the file and find out who read it; the agent asks for a new SVID.", "%s holds a key and has mode %v", path, info.Mode())
		}
	}
	if sound {
		f.ok(subject, "%s is writable, and its keys are readable, by the agent alone", a.config.RuntimeDir)
	}
}

func (a *Agent) checkDenials(f *findings) {
	if err := a.denials.fault(); err != nil {
		f.fail("denials", "It mends itself with the CA's first word: look at the connection to the CA.",
			"%s is damaged, so what was kept of SVIDs is not served before the CA says what is denied: %v", a.denials.path, err)
	}
}

// checkSources says how the sources stand that have something to say.
func (a *Agent) checkSources(f *findings) {
	for _, s := range a.standings() {
		if s.NotReady != nil {
			f.refused(s.Subject, s.NotReady)
		}
		for i, fault := range s.Faults {
			if i == workloadFindings {
				f.warn(s.Subject, "The agent's log has them all.", "%d troubles more", len(s.Faults)-i)
				break
			}
			f.warn(s.Subject, refusal.Of(fault).Do(), "%v", fault)
		}
		if s.NotReady == nil && len(s.Faults) == 0 {
			f.ok(s.Subject, "%s", s.Well)
		}
	}
}

// workloadFindings bounds the answer of a check.
const workloadFindings = 200

func (a *Agent) checkWorkloads(f *findings) {
	const subject = "workloads"
	well, ill := 0, 0
	for _, w := range a.roster.list() {
		one := &findings{}
		w.check(one)
		if len(one.list) == 0 {
			well++
			continue
		}
		if ill++; ill <= workloadFindings {
			f.list = append(f.list, one.list...)
		}
	}
	if ill > workloadFindings {
		f.fail(subject, "`certctl svid list --agent` shows them all.", "%d workloads have troubles, %d are listed", ill, workloadFindings)
	}
	f.ok(subject, "%d of %d are fresh and served", well, len(a.roster.list()))
}

// checkDeliveries looks at what goes elsewhere than to sockets; nothing is said where nothing does.
func (a *Agent) checkDeliveries(f *findings) {
	all := a.readers.list()
	ill := 0
	for _, d := range all {
		if d.Fault == "" {
			continue
		}
		if ill++; ill <= workloadFindings {
			f.fail(d.name, "It is tried again by itself; what was there before stays in use until it ends.", "%s", d.Fault)
		}
	}
	if len(all) > 0 {
		f.ok("deliveries", "%d of %d are as they should be", len(all)-ill, len(all))
	}
}

// check adds what is wrong with the workload; nothing when all is well.
func (w *workload) check(f *findings) {
	subject := "workload " + w.Socket
	if w.Pod != (Pod{}) {
		subject = "pod " + w.Pod.String()
	}
	w.mu.Lock()
	c, h, why, listening, doubt := w.standing(), w.state.held, w.state.refused, w.state.listening, w.state.doubt()
	w.mu.Unlock()
	switch c {
	case conditionFresh:
	case conditionStale:
		f.warn(subject, refusal.Of(why).Do(), "%s ends in %v and its renewal fails: %v", h.svid.ID, left(h, w.now()), why)
	case conditionUntrusted:
		f.refused(subject, doubt)
	case conditionPending:
		f.warn(subject, refusal.SVIDPending.Do(), "its first SVID has not come: %v", orNothing(why))
	case conditionBroken:
		if listening != nil {
			why = listening
		}
		f.refused(subject, why)
	case conditionDenied:
		f.refused(subject, refusal.New(refusal.IdentityDenied, "an operator denied the identity, and the agent dropped it"))
	default:
		f.refused(subject, orNothing(why))
	}
	if w.PodUID != "" {
		return // it has neither a socket nor a token
	}
	w.checkSocket(f, subject)
	tokens := &findings{}
	checkTokenFile(tokens, subject, w.TokenFile)
	for _, t := range tokens.list {
		if t.GetLevel() != meshcav1.Finding_LEVEL_OK && c != conditionBroken {
			f.list = append(f.list, t)
		}
	}
}

func orNothing(err error) error {
	if err == nil {
		return errors.New("nothing was answered yet")
	}
	return err
}

// checkSocket looks whether the socket is still as it was made.
func (w *workload) checkSocket(f *findings, subject string) {
	info, err := os.Lstat(w.Socket)
	if err != nil || info.Mode()&fs.ModeSocket == 0 {
		return // that it is not open shows as its state
	}
	if info.Mode().Perm() != w.Mode.Perm() {
		f.warn(subject, "Somebody changed it: the agent sets it when it opens the socket, so restart it, or set `mode`.", "the socket has mode %v, configured is %v", info.Mode().Perm(), w.Mode.Perm())
	}
	dir := filepath.Dir(w.Socket)
	if err := checkDir(dir); err != nil {
		f.refused(subject, err)
	} else if above := looseAbove(dir); above != "" {
		f.warn(subject, "Let the agent's user or root own it, and run: chmod go-w "+above, "others can write to %s, and so replace %s as a whole", above, dir)
	}
}
