package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

func (c *cli) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "Whether everything is as it should be here", Args: args(0, 0, "no arguments"),
		Long: `Looks at the admin sockets on this machine (or those that --socket and --agent name), and asks the CA and the
agent behind them for their own checks: certificates, clocks, permissions, reachability. Each trouble comes
with a hint. Exit code 1 when there is an error among the findings, 3 when nobody could be asked.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := c.within(cmd)
			defer cancel()
			return c.check(ctx)
		},
	}
}

func (c *cli) check(ctx context.Context) error {
	askCA, askAgent, err := c.asked()
	if err != nil {
		return err
	}
	var list []finding
	reached := 0
	add := func(source string, w who, socket string, ask func(context.Context) ([]finding, error)) {
		list = append(list, socketFindings(w.name+"'s socket", socket)...)
		found, err := ask(ctx)
		var f *failure
		switch {
		case err == nil:
			reached++
			list = append(list, found...)
		case errors.As(err, &f):
			if f.code != exitUnreachable {
				reached++
			}
			list = append(list, finding{source, "reachable", levelError, join(f.what, f.why), f.next})
		default:
			list = append(list, finding{source, "reachable", levelError, err.Error(), ""})
		}
	}
	if askCA {
		add("ca", theCA, c.socket, c.askCA)
	}
	if askAgent {
		add("agent", theAgent, c.agent, c.askAgent)
	}
	if askCA && askAgent && reached == 2 {
		list = append(list, c.compare(ctx)...)
	}
	errs, warnings := count(list, levelError), count(list, levelWarning)
	err = c.show(findings{OK: errs == 0, Findings: list}, func(p *page) {
		drawFindings(p, list)
		p.gap()
		p.line("%s: %s, %s", plural(len(list), "check", "checks"), plural(errs, "error", "errors"), plural(warnings, "warning", "warnings"))
	})
	switch {
	case err != nil:
		return err
	case reached == 0:
		return &failure{code: exitUnreachable, silent: true}
	case errs > 0:
		return negative
	}
	return nil
}

func join(what, why string) string {
	if why == "" {
		return what
	}
	return what + ": " + why
}

func (c *cli) askCA(ctx context.Context) ([]finding, error) {
	conn, err := c.openCA(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r, err := conn.CA.Check(ctx, &meshcav1.CheckRequest{})
	if err != nil {
		return nil, theCA.failed(err)
	}
	return imported("ca", r.GetFindings()), nil
}

func (c *cli) askAgent(ctx context.Context) ([]finding, error) {
	conn, err := c.openAgent(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r, err := conn.Agent.CheckAgent(ctx, &meshcav1.CheckAgentRequest{})
	if err != nil {
		return nil, theAgent.failed(err)
	}
	found := imported("agent", r.GetFindings())
	s, err := conn.Agent.GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{})
	if err != nil {
		return nil, theAgent.failed(err)
	}
	return append(found, proxyFindings(s.GetWorkloads())...), nil
}

// proxiesNamed bounds how many workloads are named by what their proxies say.
const proxiesNamed = 20

// proxyFindings are what proxies have against what they are served now; nothing when they have taken it.
func proxyFindings(workloads []*meshcav1.WorkloadStatus) []finding {
	var list []finding
	named := 0
	for _, w := range workloads {
		if w.GetLastNack() == "" && w.GetUnknownCount() == 0 && w.GetLastLimit() == "" {
			continue
		}
		if named++; named > proxiesNamed {
			continue
		}
		subject := "proxies at " + place(w)
		if w.GetLastNack() != "" {
			list = append(list, finding{"agent", subject, levelWarning, "one refuses what it was served last: " + w.GetLastNack(),
				"It goes on with what it took before, as long as that lasts: look at its log and its configuration."})
		}
		if w.GetLastLimit() != "" {
			list = append(list, finding{"agent", subject, levelWarning, "one was refused for a limit in the last minutes: " + w.GetLastLimit(), refusal.PeerLimit.Do()})
		}
		if w.GetUnknownCount() > 0 {
			list = append(list, finding{"agent", subject, levelWarning, "they wait for secrets that are not served to them: " + unknownNames(w), refusal.SecretUnknown.Do()})
		}
	}
	if more := named - proxiesNamed; more > 0 {
		list = append(list, finding{"agent", "proxies", levelWarning, fmt.Sprintf("%d more workloads have proxies with troubles", more), "`certctl status --agent` shows them all."})
	}
	return list
}

// compare looks at what neither of the two can see alone.
func (c *cli) compare(ctx context.Context) []finding {
	ca, err := c.caStatus(ctx)
	if err != nil {
		return nil // they were asked a moment ago: what has changed since is no finding of this machine
	}
	agent, err := c.agentStatus(ctx)
	if err != nil {
		return nil
	}
	f := finding{Source: "local", Subject: "CA and agent", Level: levelOK, Detail: fmt.Sprintf("both are of %s and hold bundle %d", ca.GetTrustDomain(), ca.GetBundleSequence())}
	switch {
	case ca.GetTrustDomain() != agent.GetTrustDomain():
		f.Level, f.Detail = levelError, fmt.Sprintf("the CA is of trust domain %s, the agent of %s", ca.GetTrustDomain(), agent.GetTrustDomain())
		f.Hint = "One of the two has the wrong trustDomain in its configuration."
	case agent.GetBundleSequence() < ca.GetBundleSequence():
		f.Level, f.Detail = levelWarning, fmt.Sprintf("the CA has bundle %d, the agent still %d", ca.GetBundleSequence(), agent.GetBundleSequence())
		f.Hint = "An agent has a new bundle within seconds; if this lasts, look at the agent's last error with `certctl status --agent`."
	case agent.GetBundleSequence() > ca.GetBundleSequence():
		f.Level, f.Detail = levelWarning, fmt.Sprintf("the agent has bundle %d, the CA only %d", agent.GetBundleSequence(), ca.GetBundleSequence())
		f.Hint = "The CA's store was restored from an older backup, or the agent belongs to another CA."
	}
	return []finding{f}
}

// socketFindings looks at the socket itself: who else could open it, or put another one in its place.
func socketFindings(subject, path string) []finding {
	f := finding{Source: "local", Subject: subject, Level: levelOK}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // asking says so, with the next step
	case err != nil:
		f.Level, f.Detail = levelError, err.Error()
		f.Hint = "Run certctl as root or as the daemon's user."
		return []finding{f}
	case runtime.GOOS == "windows":
		return nil // modes mean nothing there
	}
	f.Detail = fmt.Sprintf("%s has mode %04o", path, info.Mode().Perm())
	if info.Mode().Perm()&0o077 != 0 {
		f.Level = levelError
		f.Hint = "Whoever can open it gives orders: chmod 0600 " + path
	}
	list := []finding{f}
	if dir, err := os.Stat(filepath.Dir(path)); err == nil && dir.Mode().Perm()&0o002 != 0 {
		list = append(list, finding{Source: "local", Subject: subject, Level: levelError,
			Detail: fmt.Sprintf("its directory %s can be written by anyone (mode %04o)", filepath.Dir(path), dir.Mode().Perm()),
			Hint:   "Anyone could put another socket in its place: chmod o-w " + filepath.Dir(path)})
	}
	return list
}
