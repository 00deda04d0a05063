package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/api/admin/client"
)

// Exit codes; the help text says them too.
const (
	exitFine        = 0
	exitNo          = 1 // a failed check, a refusal, no such thing as was named; an empty list is fine
	exitUsage       = 2
	exitUnreachable = 3
)

const manual = `certctl asks the CA and the agents of meshca how they are, what they issued and why they refused, and gives
orders: deny an identity, renew SVIDs, replace a root. It speaks to their admin sockets, which only root and their own
user may open.

Without --socket and --agent, "status" and "check" ask whichever socket is on this machine; all else
asks the CA. Every verb prints a table for people, or with -o json and -o yaml all fields for programs.

Exit codes: 0 fine, also for a list with nothing in it · 1 a failed check, a refusal, or no such thing as was named ·
2 wrong usage · 3 cannot reach, or no answer in time.`

// cli is one run of the program: what it reads, writes and was told by flags.
type cli struct {
	in       io.Reader
	out, err io.Writer
	now      func() time.Time
	colour   bool
	// size is the terminal's that out is; nil where it is none.
	size func() (columns, rows int, err error)
	// asking is whether a person can be asked at in.
	asking bool
	// every is how often a watch asks; 0: watchEvery.
	every time.Duration

	format, socket, agent string
	// socketSet, agentSet and timeoutSet are whether the flag was given.
	socketSet, agentSet, timeoutSet bool
	timeout                         time.Duration
}

// run executes the command line and returns the exit code.
func (c *cli) run(ctx context.Context, args []string) int {
	root := c.command()
	root.SetArgs(args)
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.err)
	err := unfit(args)
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
	if err == nil {
		return exitFine
	}
	var f *failure
	if !errors.As(err, &f) { // cobra's own: unknown commands and flags, wrong numbers of arguments
		f = &failure{code: exitUsage, what: strings.TrimSuffix(cut(firstLine(err.Error())), "."), next: "See `certctl --help`"}
	}
	if ctx.Err() != nil && !f.silent { // whatever a signal made of what was under way
		f = interrupted
	}
	if !f.silent {
		fmt.Fprintln(c.err, "certctl:", f.Error())
	}
	return f.code
}

func (c *cli) command() *cobra.Command {
	root := &cobra.Command{
		Use: "certctl", Short: "Ask and order meshca's CA and agents", Long: manual, Version: version,
		SilenceErrors: true, SilenceUsage: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			c.socketSet, c.agentSet = cmd.Flags().Changed("socket"), cmd.Flags().Changed("agent")
			c.timeoutSet = cmd.Flags().Changed("timeout")
			if !slices.Contains(formats, c.format) {
				return usage("-o %.64q is not an output format: it is one of %s", c.format, strings.Join(formats, ", "))
			}
			if c.timeout <= 0 {
				return usage("--timeout %s is not a time to wait", c.timeout)
			}
			return nil
		},
	}
	f := root.PersistentFlags()
	f.StringVarP(&c.format, "output", "o", formatTable, "output: table, json or yaml")
	f.StringVar(&c.socket, "socket", client.DefaultCASocket, "the CA's admin `socket`")
	f.StringVar(&c.agent, "agent", client.DefaultAgentSocket, "ask the agent of this node, at its admin `socket` (write --agent=SOCKET)")
	f.Lookup("agent").NoOptDefVal = client.DefaultAgentSocket
	f.Lookup("agent").DefValue = "" // the help says it once, behind the name
	f.DurationVar(&c.timeout, "timeout", 30*time.Second, "how long to wait for an answer")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	root.SetVersionTemplate("certctl {{.Version}}\n")
	root.RunE = c.group(root)
	root.AddCommand(c.statusCommand(), c.checkCommand(), c.caCommand(), c.svidCommand(), c.bundleCommand(), c.backupCommand(), c.policyCommand(),
		c.explainCommand(), c.denialsCommand(), c.versionCommand())
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	return root
}

// group is what a command with subcommands does by itself: it shows them, and fails as wrong usage.
func (c *cli) group(cmd *cobra.Command) func(*cobra.Command, []string) error {
	cmd.Args = cobra.ArbitraryArgs
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return &failure{code: exitUsage, what: fmt.Sprintf("%.64q is not a command of `%s`", args[0], cmd.CommandPath()), next: joined(cmd, args) + meant(cmd, args[0]) + "See `certctl --help`"}
		}
		cmd.SetOut(c.err)
		_ = cmd.Help()
		return &failure{code: exitUsage, silent: true}
	}
}

func meant(cmd *cobra.Command, typed string) string {
	cmd.SuggestionsMinimumDistance = 2
	if s := cmd.SuggestionsFor(typed); len(s) > 0 {
		return "Did you mean " + strings.Join(s, " or ") + "? "
	}
	return ""
}

// joined is the hint for `--agent PATH`: as --agent may stand alone, the path is an argument of its own.
func joined(cmd *cobra.Command, given []string) string {
	f := cmd.Flags().Lookup("agent")
	if f == nil || !f.Changed || f.Value.String() != f.NoOptDefVal {
		return ""
	}
	for _, g := range given {
		if strings.Contains(g, "/") && !strings.HasPrefix(g, "spiffe://") || strings.HasSuffix(g, ".sock") {
			return "To name the agent's socket, write --agent=" + g + ". "
		}
	}
	return ""
}

// within bounds a verb by --timeout.
func (c *cli) within(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	return context.WithTimeout(cmd.Context(), c.timeout)
}

// args refuses a wrong number of arguments in our own words.
func args(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if len(given) < least || len(given) > most {
			return &failure{code: exitUsage, what: fmt.Sprintf("`%s` takes %s, not %s", cmd.CommandPath(), what, plural(len(given), "argument", "arguments")),
				next: joined(cmd, given) + "See `certctl --help`"}
		}
		return nil
	}
}

// screen reports whether the output is a page that can be drawn again.
func (c *cli) screen() bool { return c.size != nil }

// rows is how many lines the terminal shows.
func (c *cli) rows() int {
	if _, rows, err := c.size(); err == nil && rows > 0 {
		return rows
	}
	return 24
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
